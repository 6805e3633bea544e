"""Forward in time: one recursion, Jₜ ≈ Dₜ Jₜ₋₁ + Iₜ; the representation of J is the algorithm."""

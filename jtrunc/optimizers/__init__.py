"""What jtrunc adds to an optax chain."""

from jtrunc.optimizers.timestep_schedule import inverse_square_root as inverse_square_root
from jtrunc.optimizers.timestep_schedule import scale_by_timestep_schedule as scale_by_timestep_schedule

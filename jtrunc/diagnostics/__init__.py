"""What a gradient loses and an estimator costs: norms by lag, bias, variance; audits and plans."""

from jtrunc.diagnostics.audit import Audit as Audit
from jtrunc.diagnostics.audit import Finding as Finding
from jtrunc.diagnostics.audit import Lag as Lag
from jtrunc.diagnostics.audit import audit as audit
from jtrunc.diagnostics.cost import Cost as Cost
from jtrunc.diagnostics.cost import cost as cost
from jtrunc.diagnostics.errors import Interval as Interval
from jtrunc.diagnostics.gradient_norms import by_layer as by_layer
from jtrunc.diagnostics.gradient_norms import by_leaf as by_leaf
from jtrunc.diagnostics.gradient_norms import gradient_norms as gradient_norms
from jtrunc.diagnostics.gradient_norms import log_gradient_norms as log_gradient_norms
from jtrunc.diagnostics.plan import Choice as Choice
from jtrunc.diagnostics.plan import Claim as Claim
from jtrunc.diagnostics.plan import Plan as Plan
from jtrunc.diagnostics.plan import plan as plan
from jtrunc.diagnostics.truncation_bias import LengthEstimate as LengthEstimate
from jtrunc.diagnostics.truncation_bias import bootstrap_bands as bootstrap_bands
from jtrunc.diagnostics.truncation_bias import estimate_length as estimate_length
from jtrunc.diagnostics.truncation_bias import log_absolute_bias as log_absolute_bias
from jtrunc.diagnostics.truncation_bias import log_decay_rate as log_decay_rate
from jtrunc.diagnostics.truncation_bias import mean_log_norms as mean_log_norms
from jtrunc.diagnostics.truncation_bias import relative_bias as relative_bias
from jtrunc.diagnostics.truncation_variance import lag_products as lag_products
from jtrunc.diagnostics.truncation_variance import truncation_variance as truncation_variance

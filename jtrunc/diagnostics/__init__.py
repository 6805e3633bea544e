"""What a gradient loses: its norm by lag, the bias of a truncation, the variance of a random one."""

from jtrunc.diagnostics.gradient_norms import by_layer as by_layer
from jtrunc.diagnostics.gradient_norms import by_leaf as by_leaf
from jtrunc.diagnostics.gradient_norms import gradient_norms as gradient_norms
from jtrunc.diagnostics.gradient_norms import log_gradient_norms as log_gradient_norms
from jtrunc.diagnostics.truncation_bias import LengthEstimate as LengthEstimate
from jtrunc.diagnostics.truncation_bias import bootstrap_bands as bootstrap_bands
from jtrunc.diagnostics.truncation_bias import estimate_length as estimate_length
from jtrunc.diagnostics.truncation_bias import log_absolute_bias as log_absolute_bias
from jtrunc.diagnostics.truncation_bias import log_decay_rate as log_decay_rate
from jtrunc.diagnostics.truncation_bias import mean_log_norms as mean_log_norms
from jtrunc.diagnostics.truncation_bias import relative_bias as relative_bias
from jtrunc.diagnostics.truncation_variance import lag_products as lag_products
from jtrunc.diagnostics.truncation_variance import truncation_variance as truncation_variance

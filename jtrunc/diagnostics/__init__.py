"""What a gradient loses: its norm by lag, the bias of a truncation, the variance of a random one."""

from jtrunc.diagnostics.gradient_norms import by_layer as by_layer
from jtrunc.diagnostics.gradient_norms import by_leaf as by_leaf
from jtrunc.diagnostics.gradient_norms import gradient_norms as gradient_norms
from jtrunc.diagnostics.gradient_norms import log_gradient_norms as log_gradient_norms

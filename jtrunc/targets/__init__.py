"""Target propagation: hidden states as variables, blocks in parallel."""

from jtrunc.targets.blocks import forward_states as forward_states
from jtrunc.targets.blocks import over_blocks as over_blocks
from jtrunc.targets.constraints import kullback_leibler as kullback_leibler
from jtrunc.targets.constraints import quadratic as quadratic
from jtrunc.targets.objective import Terms as Terms
from jtrunc.targets.objective import objective as objective
from jtrunc.targets.state import TargetState as TargetState
from jtrunc.targets.state import partition_specs as partition_specs

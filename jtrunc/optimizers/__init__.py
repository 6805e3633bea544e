"""What jtrunc adds to an optax chain."""

from jtrunc.optimizers import quasi_diagonal as quasi_diagonal
from jtrunc.optimizers.qdop import QdopState as QdopState
from jtrunc.optimizers.qdop import feed_metric as feed_metric
from jtrunc.optimizers.qdop import inverse_square_root_decay as inverse_square_root_decay
from jtrunc.optimizers.qdop import metric_of as metric_of
from jtrunc.optimizers.qdop import qdop as qdop
from jtrunc.optimizers.qdop import scale_by_qdop as scale_by_qdop
from jtrunc.optimizers.quasi_diagonal import QuasiDiagonal as QuasiDiagonal
from jtrunc.optimizers.running_norm import RunningNormState as RunningNormState
from jtrunc.optimizers.running_norm import clip_by_running_norm as clip_by_running_norm
from jtrunc.optimizers.timestep_schedule import inverse_square_root as inverse_square_root
from jtrunc.optimizers.timestep_schedule import scale_by_timestep_schedule as scale_by_timestep_schedule
from jtrunc.optimizers.truncation_length import clip_by_truncation_length as clip_by_truncation_length
from jtrunc.optimizers.truncation_length import scale_by_truncation_length as scale_by_truncation_length

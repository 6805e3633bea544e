"""The papers' cells as plain functions on a declared structure."""

from jtrunc.cells.cell import Cell as Cell
from jtrunc.cells.cell import stack as stack
from jtrunc.cells.gated import gru as gru
from jtrunc.cells.gated import lstm as lstm
from jtrunc.cells.linear import linear_recurrent as linear_recurrent
from jtrunc.cells.model import Model as Model
from jtrunc.cells.model import model as model
from jtrunc.cells.model import softmax_cross_entropy as softmax_cross_entropy
from jtrunc.cells.simple import leaky as leaky
from jtrunc.cells.simple import preactivation as preactivation
from jtrunc.cells.simple import tanh as tanh

"""Tasks: data, and for the synthetic ones the closed forms that a learner is measured against."""

from jtrunc.tasks import book_order as book_order
from jtrunc.tasks import compression as compression
from jtrunc.tasks import copying as copying
from jtrunc.tasks import corpora as corpora
from jtrunc.tasks import counting as counting
from jtrunc.tasks import downloads as downloads
from jtrunc.tasks import events as events
from jtrunc.tasks import influence_balancing as influence_balancing
from jtrunc.tasks import memory_map as memory_map
from jtrunc.tasks import music as music
from jtrunc.tasks import point_process as point_process
from jtrunc.tasks import self_exciting as self_exciting
from jtrunc.tasks import synthetic_language as synthetic_language
from jtrunc.tasks import text as text
from jtrunc.tasks import words as words

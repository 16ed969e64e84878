"""The optimizers: one file a rule."""

from fusedopt.optimizers.adagrad import Adagrad
from fusedopt.optimizers.adam import Adam, AdamW
from fusedopt.optimizers.lion import Lion
from fusedopt.optimizers.nadam import NAdam
from fusedopt.optimizers.rmsprop import RMSprop
from fusedopt.optimizers.sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Lion", "NAdam", "RMSprop"]

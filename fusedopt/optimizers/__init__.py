"""The optimizers: one file a rule."""

from fusedopt.optimizers.adagrad import Adagrad
from fusedopt.optimizers.adam import Adam, AdamW
from fusedopt.optimizers.adan import Adan
from fusedopt.optimizers.lamb import LAMB
from fusedopt.optimizers.lion import Lion
from fusedopt.optimizers.nadam import NAdam
from fusedopt.optimizers.radam import RAdam
from fusedopt.optimizers.rmsprop import RMSprop
from fusedopt.optimizers.sgd import SGD
from fusedopt.optimizers.stableadamw import StableAdamW

__all__ = ["LAMB", "SGD", "Adagrad", "Adam", "AdamW", "Adan", "Lion", "NAdam", "RAdam", "RMSprop", "StableAdamW"]

"""subsetopt: train flax models to the minimum of their loss by second-order methods on growing subsets."""

from subsetopt.finetune import FinetuneResult as FinetuneResult
from subsetopt.finetune import finetune as finetune
from subsetopt.fit import FitResult as FitResult
from subsetopt.fit import fit_subset as fit_subset
from subsetopt.gauss_newton import GaussNewton as GaussNewton
from subsetopt.growth import Growth as Growth
from subsetopt.growth import draw_order as draw_order
from subsetopt.growth import overdetermination_ratio as overdetermination_ratio
from subsetopt.lbfgs import LBFGS as LBFGS
from subsetopt.solve import Progress as Progress
from subsetopt.solve import Solver as Solver
from subsetopt.solve import Status as Status

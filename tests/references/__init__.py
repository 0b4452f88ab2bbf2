"""Published caching methods, written straight from their papers and repositories on the plain PyTorch module.

They know nothing of the library, which is compared with them: decisions step by step, and outputs.
"""

from .adaptive import DBCache, EasyCache, FBCache
from .forecasting import Forecasting, adams_bashforth, berrut, foca, foca_heun, hermite, hold, rows, taylor
from .guidance import FasterCache
from .hooks import Reference
from .stack import DiCache, MagCache, TeaCache, ada_norm_single, ada_norm_zero
from .static import FORA, PAB, TGATE, BlockCaching, DeepCache, DeltaDiT, SmoothCache
from .verified import SpeCa, elementwise, ratio

__all__ = [
    "FORA",
    "PAB",
    "TGATE",
    "BlockCaching",
    "DBCache",
    "DeepCache",
    "DeltaDiT",
    "DiCache",
    "EasyCache",
    "FBCache",
    "FasterCache",
    "Forecasting",
    "MagCache",
    "Reference",
    "SmoothCache",
    "SpeCa",
    "TeaCache",
    "ada_norm_single",
    "ada_norm_zero",
    "adams_bashforth",
    "berrut",
    "elementwise",
    "foca",
    "foca_heun",
    "hermite",
    "hold",
    "ratio",
    "rows",
    "taylor",
]

"""One file per kind of system. A new kind is a file here, an import and a member of `SystemRecipe`."""

from __future__ import annotations

from typing import Annotated

from ultrafuser.compare.systems.alone import Base, Model, Oracle, Specialist
from ultrafuser.compare.systems.best_of import BestOf
from ultrafuser.compare.systems.btx import Btx
from ultrafuser.compare.systems.fused import Fused
from ultrafuser.compare.systems.merge import Merge
from ultrafuser.compare.systems.router import RouterSystem
from ultrafuser.compare.systems.static import Static
from ultrafuser.compare.systems.tuned import Tuned
from ultrafuser.typed_yaml import DiscriminatedBy

SystemRecipe = Annotated[
    Base | Specialist | Model | Oracle | Static | Merge | Tuned | RouterSystem | BestOf | Btx | Fused,
    DiscriminatedBy("kind"),
]

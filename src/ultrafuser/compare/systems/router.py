"""A trained classifier that sends each sample to one specialist."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ultrafuser.compare.systems.node import SPECIALISTS, SystemNode

if TYPE_CHECKING:
    from ultrafuser.compare.loaded import LoadedSystem
    from ultrafuser.compare.workspace import Workspace


class RouterSystem(SystemNode):
    """The specialists behind a router that reads their first states."""

    kind_label: ClassVar[str] = "router"
    description: ClassVar[str] = "Each sample is answered by the one specialist that a classifier picks."

    kind: Literal["router"] = Field(description="A trained classifier sends each sample to one specialist.")

    @property
    def depends_on(self) -> frozenset[str]:
        return SPECIALISTS | {"data", "seed"}

    def build(self, workspace: Workspace) -> int:
        from ultrafuser.compare.systems.router_model import Router

        router = Router.train(workspace.frozen_features("train"), seed=workspace.settings.seed)
        router.save(workspace.system_folder(self.id) / "model")
        return router.num_parameters

    def load(self, workspace: Workspace) -> LoadedSystem:
        from ultrafuser.compare.loaded import LoadedSystem, TestLosses, recall_answers, specialist_sizes
        from ultrafuser.compare.systems.router_model import RoutedLM, Router, route_by, router_losses

        router = Router.load(workspace.system_folder(self.id) / "model")
        model, renderer = workspace.load_all()
        specialists = workspace.split(model, renderer)
        choose = route_by(router, model, renderer)

        def read_test_rows() -> TestLosses:
            features = workspace.features("test", model, workspace.rows("test", renderer))
            return TestLosses(features.rows, router_losses(router, features))

        total, largest = specialist_sizes(model)
        return LoadedSystem(
            lm=RoutedLM(recall_answers(workspace, specialists), choose),
            fingerprint=f"router {workspace.build_key(self.id)}",
            parameters={"total": total + router.num_parameters, "active": largest},
            read_test_rows=read_test_rows,
            timed_lm=RoutedLM({name: loaded.lm for name, loaded in specialists.items()}, choose, remember=False),
        )

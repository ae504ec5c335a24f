"""Clients of a recipe's models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ultrafuser.synth.calls.request import ModelClient
from ultrafuser.synth.recipe import LocalModel, ModelRecipe


def make_clients(models: Iterable[ModelRecipe]) -> dict[str, ModelClient]:
    """Clients by the names of their models. Models behind one address and key share its pauses.

    Raises:
        MissingExtraError: a package is not installed.
        EndpointError: a key holds characters that a header cannot.
    """
    from ultrafuser.endpoint.pace import Backoff
    from ultrafuser.synth.calls.endpoint_client import EndpointClient
    from ultrafuser.synth.calls.local import LocalClient

    clients: dict[str, ModelClient] = {}
    backoffs: dict[Any, Backoff] = {}
    for model in models:
        if isinstance(model, LocalModel):
            clients[model.name] = LocalClient(model)
        else:
            address = (model.endpoint.base_url, model.endpoint.api_key_env)
            clients[model.name] = EndpointClient(model, backoffs.setdefault(address, Backoff(model.endpoint.backoff_s)))
    return clients

"""Clients of a recipe's models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ultrafuser.synth.calls.request import ModelClient
from ultrafuser.synth.recipe import ModelRecipe


def make_clients(models: Iterable[ModelRecipe]) -> dict[str, ModelClient]:
    """Callers by the models' names; those behind one address and key are left alone together when it asks for that.

    Raises:
        MissingExtraError: a package is not installed.
        EndpointError: a key holds what no header can.
    """
    from ultrafuser.endpoint.pace import Backoff
    from ultrafuser.synth.calls.endpoint_client import EndpointClient
    from ultrafuser.synth.calls.local import LocalClient

    out: dict[str, ModelClient] = {}
    backoffs: dict[Any, Backoff] = {}
    for model in models:
        if model.endpoint == "local":
            out[model.name] = LocalClient(model)
        else:
            address = (model.endpoint.base_url, model.endpoint.api_key_env)
            out[model.name] = EndpointClient(model, backoffs.setdefault(address, Backoff(model.endpoint.backoff_s)))
    return out

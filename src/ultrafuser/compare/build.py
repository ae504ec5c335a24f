"""Build one system of a comparison: train, merge, or route.

`python -m ultrafuser.compare.build FOLDER NAME` is what `ultrafuser compare` starts.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from ultrafuser.compare.process import run_step
from ultrafuser.compare.recipe import SystemRecipe
from ultrafuser.compare.systems.router import Router
from ultrafuser.compare.workspace import BUILT, MEASURED, Workspace, only_model
from ultrafuser.data.templates import Renderer
from ultrafuser.data.writing import write_json
from ultrafuser.evaluate.lm.load import load_model
from ultrafuser.recipe import JointStage, Recipe
from ultrafuser.specialists import fuse
from ultrafuser.train.run import save_fused_folder, train

DEFAULT_WEIGHT = 0.6  # of each specialist's difference in task arithmetic, TIES and DARE


def build(place: Workspace, name: str) -> dict[str, Any]:
    """Make what a system needs, and say what it cost; a run that was interrupted goes on.

    Raises:
        UltraFuserError: it cannot be made; the message says why.
    """
    system, home = place.system(name), place.home(name)
    home.mkdir(parents=True, exist_ok=True)
    begun, key = home / "build-key", place.key(name, "build")
    if not begun.is_file() or begun.read_text(encoding="utf-8") != key:  # what is here belongs to another recipe
        for stale in ("run", "model"):
            shutil.rmtree(home / stale, ignore_errors=True)
        for file in (BUILT, MEASURED):
            (home / file).unlink(missing_ok=True)
        begun.write_text(key, encoding="utf-8")
    began = time.monotonic()
    trained = _BUILDERS[system.kind](place, system) if system.kind in _BUILDERS else 0
    facts = {"key": key, "trained_parameters": trained, "seconds": round(time.monotonic() - began, 1)}
    write_json(home / BUILT, facts)
    return facts


def _fused(place: Workspace, system: SystemRecipe) -> int:
    recipe = place.training(system)
    if system.after:
        before = place.training(place.system(system.after))
        done = [stage.name for stage in before.stages]
        tree = recipe.model_dump(exclude={"specialists", "mixing", "gate", "share_base"})  # the folder has fixed them
        tree["stages"] = [stage for stage in tree["stages"] if stage["name"] not in done]
        recipe = Recipe.model_validate(tree | {"fused": str(Path(before.output) / "fused")})
    return _train(place, recipe)


def _static(place: Workspace, system: SystemRecipe) -> int:
    recipe = place.training(system)
    if system.weights == "searched":
        return _train(place, recipe)
    model, tokenizer = fuse(recipe)  # equal weights, untrained
    save_fused_folder(model, tokenizer, recipe, Path(recipe.output))
    return 0


def _tuned(place: Workspace, system: SystemRecipe) -> int:
    recipe = place.training(system)
    mine = [specialist for specialist in recipe.specialists if specialist.name == system.specialist]
    return _train(place, recipe.model_copy(update={"specialists": mine}))


def _train(place: Workspace, recipe: Recipe) -> int:
    """Run or resume a training recipe; the number of parameters that its last stage trains."""
    resume = (Path(recipe.output) / "recipe.yaml").is_file()
    tuned = len(recipe.specialists) == 1  # its rows are read by one specialist only
    features = None if tuned else place.folder / "features"
    folder = train(recipe, resume=resume, features=features, progress=place.progress)
    model: Any = load_model(str(folder), device=recipe.device, dtype=recipe.dtype).model
    gate = sum(p.numel() for p in model.gate.parameters()) if len(model.config.names) > 1 else 0
    last = recipe.stages[-1]
    if last.name == "gate":
        return gate
    whole = last.specialists == "full"
    return gate + sum(
        p.numel() for g in model.groups for p in (g.model.parameters() if whole else g.adapter_parameters())
    )


def _router(place: Workspace, system: SystemRecipe) -> int:
    router = Router.train(place.frozen_features("train"), seed=place.recipe.seed)
    router.save(place.home(str(system.name)) / "model")
    return router.num_parameters


def _merge(place: Workspace, system: SystemRecipe) -> int:
    from ultrafuser.compare.systems.merge import METHODS, merge

    found = place.checkpoints()
    needs_base, is_sparse = METHODS[system.method]
    weight = DEFAULT_WEIGHT if system.weight is None and needs_base else system.weight
    density = system.density if is_sparse else None
    output = place.home(str(system.name)) / "model"
    merge(
        list(found.specialists.values()), found.base, system.method, output,
        weight=weight, density=density, seed=place.recipe.seed,
    )  # fmt: skip
    return 0


def _btx(place: Workspace, system: SystemRecipe) -> int:
    from ultrafuser.compare.systems.btx import build_btx, save_btx, train_btx

    home, recipe = place.home(str(system.name)), place.training(system)
    stage = next(stage for stage in recipe.stages if isinstance(stage, JointStage))
    served = [place.alone(specialist) for specialist in recipe.specialists]
    renderer: Any = served[0].renderer
    first = Renderer(renderer.tokenizer, renderer.chat_templates[:1], recipe.data.max_length)
    model = build_btx([only_model(one) for one in served], seed=place.recipe.seed)
    del served
    dtype = model.dtype
    model.float()  # AdamW's small steps vanish in bfloat16
    train_btx(
        model, place.rows("train", first), home / "run",
        steps=stage.steps, rows_per_domain=stage.samples_per_domain, lr=stage.specialist_lr or stage.lr,
        rows_per_pass=stage.rows_per_device or 8, seed=place.recipe.seed, vocab_size=len(renderer.tokenizer),
        weight_decay=stage.weight_decay, max_grad_norm=stage.max_grad_norm or float("inf"),
        save_every=recipe.save_every, progress=place.progress,
    )  # fmt: skip
    save_btx(model.to(dtype), home / "model")
    renderer.tokenizer.chat_template = renderer.chat_templates[0]  # the one that it was trained in
    renderer.tokenizer.save_pretrained(home / "model")
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


_BUILDERS = {
    "fused": _fused,
    "static": _static,
    "tuned": _tuned,
    "router": _router,
    "merge": _merge,
    "btx": _btx,
}

if __name__ == "__main__":
    sys.exit(run_step(build))

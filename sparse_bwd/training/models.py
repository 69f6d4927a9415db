"""A network by name, with a head of the right width."""

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparse_bwd.training.errors import UserError, unknown


def build_model(name: str, num_classes: int) -> nn.Module:
    """The network called `name`, randomly initialised, with `num_classes` outputs.

    `name` is a torchvision or timm classification model, or `package.module:factory`. The last form imports that module
    (the working directory is searched too) and calls the factory: it runs whatever code is there.
    The head is replaced in the model where the factory chose another width; UserError if that is impossible.
    """
    model = _from_factory(name, num_classes) if ":" in name else _from_library(name, num_classes)
    _replace_head(model, num_classes, name)
    return model


def is_code(name: str) -> bool:
    """Whether building the model called `name` runs code from outside the installed model libraries."""
    return ":" in name


def head_name(model: nn.Module) -> str | None:
    """The name of the classifier: what timm's `get_classifier` returns, else the last Linear, else the last Conv2d."""
    getter: Any = getattr(model, "get_classifier", None)
    classifier = getter() if callable(getter) else None
    named: dict[str, nn.Module] = dict(model.named_modules())
    for name, module in named.items():
        if module is classifier and any(True for _ in module.parameters()):
            return name
    for kind in (nn.Linear, nn.Conv2d):
        found = [name for name, module in named.items() if type(module) is kind]
        if found:
            return found[-1]
    return None


def check_width(model: nn.Module, num_classes: int, image_size: int, name: str) -> None:
    """Sends two black images through the model; UserError unless [2, num_classes] comes out."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out = model(torch.zeros(2, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"The model {name} does not run on {image_size} x {image_size} images: {reason}"
        ) from error
    finally:
        model.train(training)
    shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
    if shape != (2, num_classes):
        raise UserError(
            f"The model {name} gives {shape} for two images, but the data needs (2, {num_classes})."
        )


def _from_factory(name: str, num_classes: int) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise UserError(f"The model {name} cannot be imported: {error}.") from error
    except AttributeError as error:
        raise UserError(f"The module {module_name} has nothing called '{attribute}'.") from error
    takes_classes = "num_classes" in inspect.signature(factory).parameters
    model = factory(num_classes=num_classes) if takes_classes else factory()
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} returned {type(model).__name__}, not a torch.nn.Module.")
    return model


def _from_library(name: str, num_classes: int) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name in known:
        extra: dict[str, Any] = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        if extra:
            extra["init_weights"] = True
        model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **extra)
        return model
    import timm

    if timm.is_model(name):
        model = timm.create_model(name, pretrained=False, num_classes=num_classes)
        return model
    raise unknown("model", name, [*known, *timm.list_models()])


def _replace_head(model: nn.Module, num_classes: int, name: str) -> None:
    """Replaces the classifier in the model, not in a local variable, if it is a Linear of another width."""
    head = head_name(model)
    if head is None:
        return
    old = model.get_submodule(head)
    if not isinstance(old, nn.Linear) or old.out_features == num_classes:
        return
    if head == "":
        raise UserError(
            f"The model {name} is a single Linear of {old.out_features} outputs; give it {num_classes}."
        )
    new = nn.Linear(old.in_features, num_classes, old.bias is not None, old.weight.device, old.weight.dtype)
    parent, _, child = head.rpartition(".")
    setattr(model.get_submodule(parent), child, new)

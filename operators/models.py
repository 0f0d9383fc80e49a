"""CLIP models by name: building them, keeping them in files, and loading one to encode with.

A model is always an `open_clip` one: a JSON config of stock towers (those shipped are in
`MODEL_CONFIGS`), or any architecture that open_clip knows. Files are read without unpickling
anything but tensors and plain types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg
from timm.models import byobnet, register_model

from tarsift.operators import storage
from tarsift.operators.architectures import MODEL_CONFIGS, is_architecture, model_config, unknown_model
from tarsift.operators.checkpoints import (
    CHECKPOINT_FORMAT,
    CHECKPOINT_VERSION,
    Base,
    Checkpoint,
    find_state_dict,
    load_checkpoint,
    load_tensors,
    load_weights,
    state_sha256,
)
from tarsift.operators.encoder_info import add_record
from tarsift.operators.encoder_settings import EncoderInfo, rgb, split_spec
from tarsift.operators.errors import UsageError
from tarsift.operators.towers import PRECISIONS, LoadedEncoder

__all__ = [
    "MODEL_CONFIGS",
    "Base",
    "Checkpoint",
    "LoadedEncoder",
    "build_model",
    "build_tokenizer",
    "load_checkpoint",
    "load_encoder",
    "load_weights",
    "model_config",
    "preprocessing",
    "save_checkpoint",
    "weights_sha256",
]


@register_model
def tarsift_repvgg4(pretrained: bool = False, **kwargs: Any) -> byobnet.ByobNet:
    """Build timm's ByobNet as four RepVGG blocks that halve a 32-pixel image to 2 x 2, for the model `tiny`."""
    config = byobnet.ByoModelCfg(
        blocks=tuple(byobnet.ByoBlockCfg(type="rep", d=1, c=width, s=2, gs=0) for width in (32, 64, 128)),
        stem_type="rep",
        stem_chs=16,
        stem_pool="",
    )
    kwargs = {k: v for k, v in kwargs.items() if k not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}
    model = byobnet.ByobNet(config, **kwargs)
    default_cfg: Any = {"input_size": (3, 32, 32), "pool_size": (2, 2), "first_conv": "stem.conv_kxk.conv"}
    model.default_cfg = default_cfg
    return model


def build_model(config: str | Path | Mapping[str, Any], *, seed: int | None) -> torch.nn.Module:
    """Build a model with random weights.

    Args:
        config: `tiny`, a path to a JSON config of stock towers, an open_clip name, or such a config.
        seed: of every initial weight, those of the text tower included; the caller's random state
            is left as it was. None draws from the caller's random state.

    Raises:
        UsageError: if there is no such model, or its config does not fit the towers.
    """
    settings = deepcopy(model_config(config))
    settings.pop("preprocess_cfg", None)
    settings["vision_cfg"]["timm_model_pretrained"] = False
    if settings["text_cfg"].get("hf_model_name"):
        settings["text_cfg"]["hf_model_pretrained"] = False
    custom_text = settings.pop("custom_text", False) or "hf_model_name" in settings["text_cfg"]
    kind = open_clip.CLIP if not custom_text else open_clip.CustomTextCLIP
    if "multimodal_cfg" in settings:
        kind = open_clip.CoCa
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            return kind(**settings)
        except (TypeError, RuntimeError, AssertionError, OSError) as error:
            raise UsageError(f"the model config does not describe a model that can be built: {error}") from error


def build_tokenizer(config: Mapping[str, Any], name: str = "") -> Callable[[list[str]], torch.Tensor]:
    """Return the tokenizer that a config asks for: open_clip's byte-pair encoding unless it names another."""
    text = config["text_cfg"]
    length = text.get("context_length", 77)
    if "siglip" in name.lower():
        return open_clip.get_tokenizer(name)
    if text.get("hf_tokenizer_name"):
        return HFTokenizer(text["hf_tokenizer_name"], context_length=length, **text.get("tokenizer_kwargs") or {})
    return open_clip.SimpleTokenizer(context_length=length, **text.get("tokenizer_kwargs") or {})


def preprocessing(config: Mapping[str, Any]) -> PreprocessCfg:
    """Return how a model's images are prepared: what its config says, and open_clip's defaults for the rest.

    Raises:
        UsageError: if the config says something else than how.
    """
    given = config.get("preprocess_cfg", {})
    try:
        return PreprocessCfg(**given)
    except (TypeError, AssertionError) as error:
        raise UsageError(f"the model config's `preprocess_cfg` is none of open_clip's: {given}. {error}") from error


def _written(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of open_clip's settings a config keeps; the size is the image tower's."""
    return {name: preprocess[name] for name in ("mean", "std", "interpolation", "resize_mode") if name in preprocess}


def load_encoder(
    spec: str, *, device: str | torch.device = "cpu", precision: str = "fp32", allow_random: bool = False
) -> LoadedEncoder:
    """Load a model to encode with.

    Args:
        spec: one of `enc.pt` (written by `pretrain`), `RN50:/models/cc3m.pt` (architecture and a file
            of weights), `config.json:weights.pt`, `ViT-B-32:laion2b_s34b_b79k` (a tag of open_clip),
            `hf-hub:org/name`, `local-dir:/folder`, or, with `allow_random`, the bare name of an
            architecture. Files may be fsspec URLs.
        device: where the weights go.
        precision: `fp32`, `bf16` or `fp16`, of weights and arithmetic.
        allow_random: accept an architecture without weights; what it says about samples means nothing.

    Raises:
        UsageError: if the model, the tag or the file does not exist, or they do not fit together.
        TarsiftError: if the file is damaged or holds more than tensors.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    source, weights = split_spec(spec)
    if source in ("hf-hub", "local-dir"):
        encoder = _published(spec, None)
    elif weights is None and is_architecture(source):
        if not allow_random:
            raise UsageError(
                f"{spec!r} names an architecture without weights, and an untrained encoder sees nothing. "
                f"Give weights, as in {spec}:FILE or {spec}:TAG, or train one with `tarsift pretrain`."
            )
        config = model_config(source)
        encoder = _describe(
            build_model(config, seed=0), config, f"{spec} (random weights)", build_tokenizer(config, source)
        )
    elif weights is None:
        encoder = _from_checkpoint(load_checkpoint(_existing(spec)), spec)
    elif weights in open_clip.list_pretrained_tags_by_model(source):
        encoder = _published(source, weights)
    else:
        encoder = _from_weights(source, _existing(weights, architecture=source), spec)
    encoder.model.to(device=device, dtype=PRECISIONS[precision]).eval().requires_grad_(False)
    return encoder


def save_checkpoint(
    url: str | Path,
    model: torch.nn.Module,
    *,
    config: Mapping[str, Any],
    shards: Mapping[str, str],
    steps: int,
    samples: int,
    seed: int,
    extra: Mapping[str, Any] | None = None,
    base: Base | None = None,
) -> None:
    """Write an encoder file that says what it is and what it was trained on, in a record of its own too.

    Args:
        url: where to, any fsspec URL.
        model: its weights are kept in the precision they have.
        config: the model's JSON config; the file says all of how images are prepared, defaults included.
        shards: name and SHA-256 of every shard file that this training saw.
        steps: optimiser steps it took.
        samples: image-text pairs it saw, repeats included.
        seed: of weights and order.
        extra: more to record; plain types.
        base: what the weights had been before, if not random.
    """
    checkpoint = Checkpoint(
        config={**config, "preprocess_cfg": _written(asdict(preprocessing(config)))},
        state_dict={k: v.detach().to("cpu").contiguous().clone() for k, v in model.state_dict().items()},
        shards=dict(shards),
        steps=steps,
        samples=samples,
        seed=seed,
        extra=dict(extra or {}),
        base=base,
    )
    content = {name: getattr(checkpoint, name) for name in Checkpoint.__dataclass_fields__}
    content |= {
        "format": CHECKPOINT_FORMAT,
        "version": CHECKPOINT_VERSION,
        "base": None if base is None else asdict(base),
    }
    record = _record_of(checkpoint)
    with storage.open_write(str(url)) as file:
        torch.save(content, file)
        if record is not None:
            add_record(file, record)


def _record_of(checkpoint: Checkpoint) -> EncoderInfo | None:
    """Describe what an encoder file holds; None where its config leaves something to be found out by loading it."""
    config = checkpoint.config
    prepared = config["preprocess_cfg"]
    try:
        size, dim, length = (
            config["vision_cfg"]["image_size"], config["embed_dim"], config["text_cfg"]["context_length"]
        )  # fmt: skip
    except KeyError:
        return None
    if not isinstance(size, int):
        return None
    return EncoderInfo(
        name="",
        weights_sha256=state_sha256(checkpoint.state_dict),
        embed_dim=dim,
        image_size=size,
        mean=rgb(prepared["mean"]),
        std=rgb(prepared["std"]),
        interpolation=prepared["interpolation"],
        resize_mode=prepared["resize_mode"],
        context_length=length,
        trained_on=checkpoint.trained_on,
        steps=checkpoint.total_steps,
        unknown_base=checkpoint.unknown_base,
    )


def weights_sha256(model: torch.nn.Module) -> str:
    """Return the digest of a model's weights: names, types, shapes and bytes, in the order of their names."""
    return state_sha256(model.state_dict())


def _from_checkpoint(checkpoint: Checkpoint, spec: str) -> LoadedEncoder:
    model = build_model(checkpoint.config, seed=0)
    load_weights(model, checkpoint.state_dict, spec)
    stored = state_sha256(checkpoint.state_dict)
    encoder = _describe(model, checkpoint.config, spec, build_tokenizer(checkpoint.config), weights=stored)
    return replace(
        encoder,
        trained_on=checkpoint.trained_on,
        steps=checkpoint.total_steps,
        unknown_base=checkpoint.unknown_base,
        config=checkpoint.config,
    )


def _from_weights(source: str, url: str, spec: str) -> LoadedEncoder:
    config = model_config(source)
    model = build_model(config, seed=0)
    load_weights(model, find_state_dict(load_tensors(url), url), url)
    return replace(_describe(model, config, spec, build_tokenizer(config, source)), config=config)


def _published(name: str, tag: str | None) -> LoadedEncoder:
    """Let open_clip fetch (or find in its cache) and build a pretrained model."""
    spec = name if tag is None else f"{name}:{tag}"
    try:
        model = open_clip.create_model(name, pretrained=tag, weights_only=True, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # network, cache, config and format errors of three libraries
        raise UsageError(f"open_clip cannot load {spec!r}: {error}") from error
    used = open_clip.get_model_preprocess_cfg(model)
    config = {"preprocess_cfg": _written(used)}
    encoder = _describe(model, config, spec, tokenizer)
    if tag is not None:  # the model is that of the name, whatever the tag
        return replace(encoder, config={**model_config(name), **config})
    return encoder


def _describe(
    model: Any,
    config: Mapping[str, Any],
    name: str,
    tokenizer: Callable[[list[str]], torch.Tensor],
    *,
    weights: str | None = None,
) -> LoadedEncoder:
    """Return a model with all that is known of it; weights: their digest, None: of those that are in the model."""
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    if height != width:
        raise UsageError(f"{name} takes images of {height} x {width} pixels; only square ones are supported.")
    with torch.inference_mode():
        embed_dim = model.eval().encode_image(torch.zeros(1, 3, height, width)).shape[-1]
    preprocess = preprocessing(config)
    return LoadedEncoder(
        model=model,
        tokenizer=tokenizer,
        image_size=height,
        mean=rgb(preprocess.mean),
        std=rgb(preprocess.std),
        interpolation=preprocess.interpolation,
        resize_mode=preprocess.resize_mode,
        context_length=model.context_length,
        embed_dim=embed_dim,
        name=name,
        weights_sha256=weights or weights_sha256(model),
        trained_on=None,
        steps=None,
        config=None,
    )


def _existing(url: str, *, architecture: str | None = None) -> str:
    """Return `url` if it is a file, else say what else the spec could have meant."""
    if architecture is not None and not is_architecture(architecture):
        raise UsageError(unknown_model(architecture))
    if storage.exists(url):
        return url
    if architecture is not None:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        known = f" (tags: {', '.join(tags)})" if tags else ""
        raise UsageError(f"{url!r} is neither a file of weights nor a tag of {architecture}{known}.")
    if "/" in url or "." in url:
        raise UsageError(f"there is no encoder file {url!r}.")
    raise UsageError(unknown_model(url))

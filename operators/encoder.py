"""The encoder as an operator: the map that appends embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from pydantic import ValidationError

from tarsift.operators.dilution import dilute
from tarsift.operators.encoder_settings import EncoderConfig
from tarsift.operators.errors import ChangedError, ConfigError, TarsiftError, UsageError
from tarsift.operators.images import DecodeImages
from tarsift.operators.schema import append, as_table, fixed_size_list, matrix
from tarsift.operators.towers import choose_device, cosines, encode_captions, encode_images, norms


class ClipEncoder:
    """Append image and caption embeddings, their cosine, and the image embedding's norm.

    A map over Arrow tables or dicts of arrays with `pixels` (from `DecodeImages`) or else `image`
    (bytes, decoded here), and `caption`. It appends `image_embedding`, `image_norm`,
    `text_embedding` and `clip_similarity`, or those of the towers asked for, and drops `pixels`; with
    `views`, also `view_embeddings`, those of diluted copies of the image (see `dilution`).
    Embeddings are raw, not normalised; null where the image or the caption is. The norm and the
    cosine are those of the embeddings as stored. An image that cannot be decoded here gets an `error`.

    When GPU memory runs out, the micro-batch is halved for good.

    Args:
        encoder: its settings, or its spec alone.
        weights_sha256: digest that the weights must have, as `encoder_info` says.
        settings: fields of `EncoderConfig` that override.

    Raises:
        UsageError: if the encoder or the device is not there, or a setting is wrong.
        ChangedError: if its weights have another digest.

    Example:
        >>> ds = ds.map_batches(ClipEncoder, fn_constructor_kwargs={"encoder": "enc.pt"},
        ...                     batch_size=256)                                       # doctest: +SKIP
    """

    def __init__(self, encoder: str | EncoderConfig, *, weights_sha256: str | None = None, **settings: Any) -> None:
        given = encoder.model_dump() if isinstance(encoder, EncoderConfig) else {"spec": encoder}
        try:
            self.config = EncoderConfig(**{**given, **settings})
        except ValidationError as error:
            problems = "; ".join(f"`{'.'.join(map(str, e['loc']))}`: {e['msg']}" for e in error.errors())
            raise ConfigError(f"{problems}. Settings: {', '.join(EncoderConfig.model_fields)}.") from None
        # OpenMP left to itself spins on every core, which costs many times over when processes share them.
        torch.set_num_threads(self.config.threads)
        self.device = choose_device(self.config.device)
        settled = self.config.settled(gpu=self.device.type == "cuda")
        self.precision, self.micro_batch, self.views = settled.precision, settled.micro_batch, settled.views or 0
        from tarsift.operators.models import load_encoder  # not where this class is only named: it takes seconds

        self.encoder = load_encoder(self.config.spec, device=self.device)
        if weights_sha256 not in (None, self.encoder.weights_sha256):
            raise ChangedError(
                f"the weights of {self.encoder.name} have the digest {self.encoder.weights_sha256[:12]}, and not "
                f"{weights_sha256[:12]} as when the run began: they were replaced while it was on, or the file is "
                "damaged. Put the earlier ones back and run the same command again, or give another --out."
            )
        self.encoder.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.decode = DecodeImages(
            self.encoder.image_size,
            interpolation=self.encoder.interpolation,
            resize_mode=self.encoder.resize_mode,
            keep_image=True,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return ClipEncoder, (self.config,)  # loaded where it arrives, on the device that is there

    def __call__(self, batch: pa.Table | Mapping[str, Any]) -> pa.Table:
        """Append the columns to a batch.

        Raises:
            TarsiftError: if an embedding is not finite, or out of float16's range when that is stored.
        """
        table = as_table(batch)
        new: dict[str, pa.Array] = {}
        image = text = None
        if "image" in self.config.towers:
            if "pixels" not in table.column_names:
                table = self.decode(table)
            pictures, seen = self._pictures(table["pixels"])
            image = self._stored(self._encode(encode_images, pictures), seen), seen
            new["image_embedding"] = fixed_size_list(*image)
            if self.views:
                new["view_embeddings"] = fixed_size_list(self._diluted(pictures, seen), seen)
            new["image_norm"] = pa.array(norms(image[0]), mask=~image[1])
        if "text" in self.config.towers:
            text = self._captions(table["caption"])
            new["text_embedding"] = fixed_size_list(*text)
        if image is not None and text is not None:
            new["clip_similarity"] = pa.array(cosines(image[0], text[0]), mask=~(image[1] & text[1]))
        table = append(table, new)
        return table.drop_columns(["pixels"]) if "pixels" in table.column_names else table

    def _pictures(self, column: pa.ChunkedArray) -> tuple[UInt8[np.ndarray, "m s s 3"], Bool[np.ndarray, " n"]]:
        """Return the pictures that are there, and which rows have one."""
        pixels, valid = matrix(column)
        size = self.encoder.image_size
        if pixels.shape[1] != size * size * 3:
            raise UsageError(
                f"`pixels` holds {pixels.shape[1]} values per row, {self.encoder.name} takes {size} x {size} x 3. "
                f"Decode with DecodeImages({size})."
            )
        return (pixels if valid.all() else pixels[valid]).reshape(-1, size, size, 3), valid

    def _diluted(
        self, pictures: UInt8[np.ndarray, "m s s 3"], valid: Bool[np.ndarray, " n"]
    ) -> Float[np.ndarray, "n vd"]:
        """Embed diluted copies of the pictures; each row holds those of one, one after another."""
        copies = (dilute(pictures, view, fill=self.encoder.mean) for view in range(self.views))
        return np.concatenate([self._stored(self._encode(encode_images, copy), valid) for copy in copies], axis=1)

    def _captions(self, column: pa.ChunkedArray) -> tuple[Float[np.ndarray, "n d"], Bool[np.ndarray, " n"]]:
        captions = column.combine_chunks().dictionary_encode()  # equal captions are encoded once
        valid = np.asarray(captions.is_valid())
        distinct = self._encode(encode_captions, np.array(captions.dictionary.to_pylist(), object))
        return self._stored(distinct[captions.indices.drop_null().to_numpy()], valid), valid

    def _encode(self, encode: Callable[..., Float32[np.ndarray, "n d"]], rows: np.ndarray) -> np.ndarray:
        """Encode rows; where GPU memory runs out in smaller micro-batches, and what overflows once more in fp32."""
        while True:
            try:
                out = encode(self.encoder, rows, micro_batch=self.micro_batch, precision=self.precision)
                overflown = ~np.isfinite(out).all(axis=1)
                if self.precision != "fp32" and overflown.any():
                    out[overflown] = encode(self.encoder, rows[overflown], micro_batch=self.micro_batch)
                return out
            except torch.cuda.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise
                self.micro_batch //= 2  # pyright: ignore[reportOperatorIssue]  # `settled` leaves no None
            torch.cuda.empty_cache()  # out here the failed pass's tensors are no longer referenced

    def _stored(self, embeddings: Float32[np.ndarray, "m d"], valid: Bool[np.ndarray, " n"]) -> np.ndarray:
        """Put the embeddings of valid rows in their places, in the type that is stored; other rows are zeros."""
        largest = np.abs(embeddings).max(initial=0)  # NaN if any is
        if not np.isfinite(largest):
            raise TarsiftError(
                f"{self.encoder.name} gives embeddings that are not finite, in fp32 as well: its weights are damaged."
            )
        if self.config.store == "float16" and largest > np.finfo(np.float16).max:
            raise TarsiftError(
                f"{self.encoder.name} gives embeddings up to {largest:.3g}, and float16 ends at 65504. "
                "Set the encoder's `store` to float32."
            )
        out = np.zeros((len(valid), self.encoder.embed_dim), self.config.store)
        out[valid] = embeddings
        return out

"""The folder of a student or of a teacher in, an encoder that may go on learning out.

A teacher's folder is read as plain files, its config.json and its weights: no transformers, no teacher object.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cache.errors import StoreError
from cache.publish import digest_file, digest_json, read_json
from pipeline.finetune.settings import FinetuneParams, Tuned
from pipeline.student.adopt import adopt, read_shape
from pipeline.student.checkpoint import load_student, student_digest
from pipeline.student.encoder import Encoder
from pipeline.student.shape import EncoderShape


class Start(NamedTuple):
    """What a fine-tuning begins with."""

    kind: Literal["student", "teacher"]
    name: str
    """Of its folder."""
    digest: str
    """Of what it computes."""
    shape: EncoderShape
    weights: dict[str, Tensor]

    @property
    def facts(self) -> dict[str, Any]:
        """For the product."""
        return {"kind": self.kind, "name": self.name, "digest": self.digest}

    def encoder(self, params: FinetuneParams) -> Encoder:
        """A new encoder with these weights, and with the dropout that the settings ask for."""
        tuned = params.encoder
        shape, mult = self.shape, 1.0
        if isinstance(tuned, Tuned):
            mult = tuned.feature_grad_mult
            shape = shape if tuned.dropout is None else shape.model_copy(update={"dropout": tuned.dropout})
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten
            encoder = Encoder(shape, mult)
        encoder.load_state_dict(self.weights)
        return encoder


def open_start(folder: Path) -> Start:
    """Whatever lies in the folder, told by the file it has.

    Raises:
        StoreError: neither a student nor a teacher whose trunk the encoder computes; or its bytes have changed.
    """
    if (folder / "shape.json").exists():
        encoder = load_student(folder)
        return Start("student", folder.name, student_digest(folder), encoder.shape, encoder.state_dict())
    if (folder / "teacher.json").exists():
        shape = read_shape(folder, bool(read_json(folder / "teacher.json")["normalise"]))
        weights = digest_file(folder / "model.safetensors")
        digest = digest_json({"shape": shape.model_dump(mode="json"), "weights": weights})
        return Start("teacher", folder.name, digest, shape, adopt(folder))
    raise StoreError(
        f"{folder} is no model that can be fine-tuned: it has neither shape.json nor teacher.json; make it with "
        "`dvc repro distill` or `dvc repro teacher`"
    )

"""A trained student as a folder: an encoder in, weights.safetensors and shape.json out, and back.

shape.json holds the shape, the SHA-256 of the weights (safetensors loads a flipped bit without a word) and whatever the
training wants to be remembered: its settings and its targets.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import load_file, save

from cache.errors import StoreError
from cache.publish import digest_file, digest_json, read_json, write_json
from pipeline.student.encoder import Encoder
from pipeline.student.shape import EncoderShape

FORMAT = 1
MADE_BY = {"student": "distill", "finetuned": "finetune"}  # which command writes a folder of which kind


def save_student(directory: Path, encoder: Encoder, facts: dict[str, Any]) -> None:
    """Write a student into an existing folder; the same weights and facts give the same bytes.

    A `kind` among the facts is that of the folder: "finetuned" for one of `decant finetune`.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    (directory / "weights.safetensors").write_bytes(save(weights))  # save_file hides what the disk refuses
    described = {
        "format": FORMAT,
        "kind": "student",
        "shape": encoder.shape.model_dump(mode="json"),
        "weights": digest_file(directory / "weights.safetensors"),
        **facts,
    }
    write_json(directory / "shape.json", described)


def load_student(directory: Path) -> Encoder:
    """Read a student, in evaluation mode.

    Raises:
        StoreError: a file is missing, from a newer version, or its bytes are not those that were written.
    """
    described = read_json(directory / "shape.json")
    kind, version = described.get("kind"), described.get("format")
    if kind not in MADE_BY or version != FORMAT:
        raise StoreError(
            f"{directory}/shape.json is {kind} format {version}; this version reads student format {FORMAT}"
        )
    weights = directory / "weights.safetensors"
    remedy = f"delete {directory} and run `decant {MADE_BY[kind]}` again"
    if not weights.exists():
        raise StoreError(f"{weights} does not exist; {remedy}")
    if digest_file(weights) != described["weights"]:
        raise StoreError(f"{weights} is not what shape.json describes (its SHA-256 differs); {remedy}")
    try:
        encoder = Encoder(EncoderShape.model_validate(described["shape"]))
    except ValidationError as error:
        raise StoreError(f"{directory}/shape.json: {error.errors()[0]['msg']}; {remedy}") from error
    encoder.load_state_dict(load_file(weights))
    return encoder.eval()


def student_digest(directory: Path) -> str:
    """Identity of what a student computes: its shape and its weights, whatever it was trained on."""
    described = read_json(directory / "shape.json")
    return digest_json({"shape": described["shape"], "weights": described["weights"]})

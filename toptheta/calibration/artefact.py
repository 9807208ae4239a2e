"""A shareable calibration: its tables, their settings and a model card, as a folder or a Hugging Face hub
repository.

A folder contains calibration.safetensors, config.json and README.md. Covers the files only: models/sharing.py
takes a calibration from a model and applies one to it.
"""

import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, TypedDict, get_type_hints

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download

from toptheta.calibration.tables import BINARY_NAME, CalibrationTables, load_tables, save_binary
from toptheta.methods.params import MethodOptions
from toptheta.util.files import make_folder
from toptheta.util.schema import typed

FORMAT = "toptheta-calibration-1"
PAPER = "https://arxiv.org/abs/2502.08363"
MOST_TOKENS = 1 << 24  # in a row of a table that is read: more are taken for damage
SHAPING = ("calib_tac", "calib_add_sigma", "calib_sample_frac", "calib_layers")  # options of the calibration
# The options that a calibration is used with, besides the method and K, by name and type
OPTIONS = {
    f.name: get_type_hints(MethodOptions)[f.name]
    for f in fields(MethodOptions)
    if f.name not in (*SHAPING, "calib_load_path", "when_slower")
}
Params: Any = TypedDict("Params", {"method": str, "K": int | list[int]} | OPTIONS)  # type: ignore[misc]


@dataclass(frozen=True)
class CalibrationConfig:
    """config.json: the model and settings of the tables, and how they were calibrated.

    base_model: hub id or name; revision: its commit; model_type: that of transformers; empty where unknown,
    like sizes of 0. params: the method and its options, as `set_params` takes them; calibrated_with: the
    options of the calibration. text: name of the calibration text; rows: sampled rows of each head of a
    layer; longest: the length of the longest of them. measured: what `measure` of models/sharing.py found on
    other text, empty if not measured.
    """

    format: str
    base_model: str
    revision: str
    model_type: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    params: dict[str, Any]
    calibrated_with: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    rows: int = 0
    longest: int = 0
    measured: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)


class Calibration(
    ModelHubMixin,
    library_name="toptheta",
    tags=["top-theta", "sparse-attention"],
    paper_url=PAPER,
    model_card_template=resources.files(__package__).joinpath("card.md.j2").read_text(encoding="utf-8"),
):
    """Tables and their config. `save_pretrained`, `push_to_hub` and `from_pretrained` are those of
    huggingface_hub."""

    def __init__(self, tables: CalibrationTables, config: CalibrationConfig):
        self.tables, self.config = tables, config

    def _save_pretrained(self, save_directory: Path) -> None:
        save_binary(self.tables, save_directory)

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        config: CalibrationConfig | None = None,
    ) -> "Calibration":
        """Raises UsageError for tables that are damaged or do not match config.json, ValueError if
        config.json is missing or has another format, and what `hf_hub_download` raises."""
        if os.path.isdir(model_id):
            folder = model_id
        else:
            folder = os.path.dirname(
                hf_hub_download(
                    model_id,
                    BINARY_NAME,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    token=token,
                    local_files_only=local_files_only,
                )
            )
        if config is None or config.format != FORMAT:
            raise ValueError("its config.json is missing, or not that of a calibration")
        typed(asdict(config), CalibrationConfig)
        typed(config.params, Params)
        unknown = config.params.keys() - Params.__annotations__
        if unknown:
            raise ValueError(f"its params have the unknown {', '.join(sorted(unknown))}")
        sizes = config.num_layers, config.num_heads
        return cls(load_tables(folder, *sizes, "the calibration", max_length=MOST_TOKENS), config)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card, from card.md.j2."""
        info, config = self._hub_mixin_info, self.config
        data = ModelCardData(**info.model_card_data.to_dict())
        if config.base_model.count("/") == 1:  # metadata takes hub ids only
            data.base_model = config.base_model
        return ModelCard.from_template(
            data, template_str=info.model_card_template, config=config, paper_url=info.paper_url
        )

    def save(self, folder: Path | str) -> None:
        """Write all files into `folder`, replacing those of an earlier calibration; each file is written
        completely or not at all."""
        folder = Path(folder)
        make_folder(folder)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            self.save_pretrained(temporary)
            for file in temporary.iterdir():
                os.replace(file, folder / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

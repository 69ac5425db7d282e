"""What a person types about the report: settings in, checked settings out."""

from pydantic import BaseModel

from pipeline.report.listening import ListenParams
from pipeline.report.superb import SuperbParams


class ReportParams(BaseModel, frozen=True, extra="forbid"):
    """What the report says beyond what the products hold; changes no product."""

    superb: SuperbParams | None
    """One number a model; null: none."""
    listen: ListenParams | None
    """Players for the worst errors; null: none."""

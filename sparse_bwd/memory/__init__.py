"""Where every byte goes: saved bytes, peak bytes, a timeline, prediction without computing, explanation."""

from .explain import Explanation, Row, explain
from .layouts import Layouts
from .peak import Peak, held_between_steps, peak_bytes, resident_bytes, step_peak
from .predict import Prediction, predict
from .saved import Kept, SavedTensors, StepBytes, saved_bytes, saved_storages
from .timeline import Timeline, timeline

__all__ = [
    "saved_bytes",
    "saved_storages",
    "SavedTensors",
    "StepBytes",
    "Kept",
    "peak_bytes",
    "step_peak",
    "resident_bytes",
    "Peak",
    "explain",
    "held_between_steps",
    "Explanation",
    "Row",
    "Layouts",
    "predict",
    "Prediction",
    "timeline",
    "Timeline",
]

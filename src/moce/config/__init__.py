"""The settings of every command: name, type, default, unit and facts, defined once.

Flags, recipes, keyword arguments and help texts are made from these classes; `moce.config.load`
validates values against them. Nothing heavy is imported, so that `moce --help` is fast.
"""

from moce.config.base import (
    ChosenSettings,
    ClusterPooling,
    LoggerName,
    Metric,
    MonitoredSettings,
    Role,
    RunSettings,
    RuntimeSettings,
    Settings,
    Strategy,
    TrainingSettings,
    expand,
)
from moce.config.dense import DetectorHead, PredictSettings, SegmenterHead
from moce.config.distill import DistillSettings
from moce.config.evaluation import EmbedSettings, EvaluateSettings, FinetuneSettings, ProbeSettings
from moce.config.pipeline import (
    AdaptationSettings,
    ClusterSettings,
    CustomizeSettings,
    FileSettings,
    HeadroomSettings,
    PretrainSettings,
    TrainSettings,
)
from moce.config.tools import (
    ConvertSettings,
    DemoSettings,
    DoctorSettings,
    ExploreSettings,
    ExportSettings,
    PackSettings,
    PipelineSettings,
    PushSettings,
    ReportSettings,
)


def settings_classes() -> list[type[Settings]]:
    """The classes above."""
    return [value for name, value in globals().items() if name.endswith("Settings")]


__all__ = [
    "AdaptationSettings",
    "ChosenSettings",
    "ClusterPooling",
    "ClusterSettings",
    "ConvertSettings",
    "CustomizeSettings",
    "DemoSettings",
    "DetectorHead",
    "DistillSettings",
    "DoctorSettings",
    "EmbedSettings",
    "EvaluateSettings",
    "ExploreSettings",
    "ExportSettings",
    "FileSettings",
    "FinetuneSettings",
    "HeadroomSettings",
    "LoggerName",
    "Metric",
    "MonitoredSettings",
    "PackSettings",
    "PipelineSettings",
    "PredictSettings",
    "PretrainSettings",
    "ProbeSettings",
    "PushSettings",
    "ReportSettings",
    "Role",
    "RunSettings",
    "RuntimeSettings",
    "SegmenterHead",
    "Settings",
    "Strategy",
    "TrainSettings",
    "TrainingSettings",
    "expand",
    "settings_classes",
]

"""The settings of every verb: names, types, defaults, units. Flags, recipes and functions read them here.

One class per verb; `moce.parsing` checks values against them. Nothing heavy is imported, so that
`moce --help` is quick.
"""

from moce.config.base import (
    BalanceScope,
    CentroidUpdate,
    ClusterPooling,
    Data,
    DataSettings,
    Format,
    GateInit,
    GateScale,
    Method,
    Metric,
    Pooling,
    Protocol,
    Role,
    RunSettings,
    RuntimeSettings,
    Settings,
    Strategy,
    TrainingSettings,
    expand,
)
from moce.config.stages import (
    ClusterSettings,
    CustomizeSettings,
    FileSettings,
    HeadroomSettings,
    MAESettings,
    PretrainSettings,
    TrainSettings,
    WeightsSettings,
)
from moce.config.tools import (
    ConvertSettings,
    DemoSettings,
    DoctorSettings,
    ExportSettings,
    PackSettings,
    ReportSettings,
)
from moce.config.transfer import (
    EvaluateSettings,
    FinetuneSettings,
    ProbeSettings,
)

__all__ = [
    "BalanceScope",
    "CentroidUpdate",
    "ClusterPooling",
    "ClusterSettings",
    "ConvertSettings",
    "CustomizeSettings",
    "Data",
    "DataSettings",
    "DemoSettings",
    "DoctorSettings",
    "EvaluateSettings",
    "ExportSettings",
    "FileSettings",
    "FinetuneSettings",
    "Format",
    "GateInit",
    "GateScale",
    "HeadroomSettings",
    "MAESettings",
    "Method",
    "Metric",
    "PackSettings",
    "Pooling",
    "PretrainSettings",
    "ProbeSettings",
    "Protocol",
    "ReportSettings",
    "Role",
    "RunSettings",
    "RuntimeSettings",
    "Settings",
    "Strategy",
    "TrainSettings",
    "TrainingSettings",
    "WeightsSettings",
    "expand",
]

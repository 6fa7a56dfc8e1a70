"""A Dockerfile's instructions, and the rules that ours keeps, checked without an engine."""

import fnmatch
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.infra.manifests import ROOT

DOCKERFILE = ROOT / "infra" / "docker" / "Dockerfile"
IGNORED = ROOT / ".dockerignore"
KNOWN = frozenset(
    "ADD ARG CMD COPY ENTRYPOINT ENV EXPOSE FROM HEALTHCHECK LABEL RUN SHELL STOPSIGNAL USER "
    "VOLUME WORKDIR".split()
)
TARGETS = ("cpu", "cuda")
_EXACT = re.compile(r"[\w./-]+:[\w.-]*\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?")
_SECRET = re.compile(r"(PASSWORD|SECRET|TOKEN|API_KEY|ACCESS_KEY)[A-Z_]*\s*=\s*\S", re.IGNORECASE)


@dataclass(frozen=True)
class Instruction:
    """One instruction, with the line it begins on."""

    line: int
    name: str
    value: str

    @property
    def flags(self) -> dict[str, str]:
        """Its own options, such as --from=STAGE."""
        words = [word for word in self.value.split() if word.startswith("--")]
        return dict(word[2:].partition("=")[::2] for word in words)

    @property
    def words(self) -> list[str]:
        """What is left without its own options; a JSON list as it is."""
        if self.value.startswith("["):
            return list(json.loads(self.value))
        rest = self.value
        while found := re.match(r"--\S+\s+", rest):
            rest = rest[found.end() :]
        return shlex.split(rest) if self.name != "RUN" else [rest]

    @property
    def commands(self) -> list[list[str]]:
        """What a RUN runs, one list of words a command."""
        return [shlex.split(one) for one in re.split(r"&&|\|\||;|\|", self.words[0])]


@dataclass
class Stage:
    """From one FROM to the next."""

    name: str
    image: str
    instructions: list[Instruction] = field(default_factory=list)

    def of(self, *names: str) -> list[Instruction]:
        return [one for one in self.instructions if one.name in names]


def instructions(text: str) -> Iterator[Instruction]:
    """A Dockerfile's instructions; raises ValueError on what is none."""
    begin, gathered = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or not (line.strip() or gathered):
            continue
        begin = begin if gathered else number
        gathered += line.strip()
        if gathered.endswith("\\"):
            gathered = gathered[:-1].rstrip() + " "
            continue
        name, _, value = gathered.partition(" ")
        if name not in KNOWN or not value.strip():
            raise ValueError(f"line {begin}: {gathered!r} is no instruction")
        yield Instruction(begin, name, value.strip())
        gathered = ""
    if gathered:
        raise ValueError(f"line {begin}: goes on after the end")


def stages(text: str) -> list[Stage]:
    """The stages, their images' variables filled in."""
    defaults: dict[str, str] = {}
    found: list[Stage] = []
    for one in instructions(text):
        if one.name == "FROM":
            image, _, name = one.value.partition(" AS ")
            for key, value in defaults.items():
                image = image.replace(f"${{{key}}}", value)
            found.append(Stage(name, image))
        elif found:
            found[-1].instructions.append(one)
        elif one.name == "ARG":
            key, _, value = one.value.partition("=")
            defaults[key] = value
    return found


def lineage(name: str, found: Sequence[Stage]) -> list[Stage]:
    """A stage and what it builds on, the oldest first."""
    by_name = {stage.name: stage for stage in found}
    line = [by_name[name]]
    while line[0].image in by_name:
        line.insert(0, by_name[line[0].image])
    return line


def ignored(path: str, patterns: Sequence[str]) -> bool:
    """Whether a path is left out of what is sent to the builder, as the last rule says."""
    out = False
    for pattern in patterns:
        wanted = pattern.removeprefix("!").rstrip("/")
        parents = [path, *(str(parent) for parent in Path(path).parents)]
        names = [wanted, wanted.removeprefix("**/")]
        if any(fnmatch.fnmatch(each, name) for each in parents for name in names):
            out = not pattern.startswith("!")
    return out


def ignore_patterns() -> list[str]:
    """The rules of .dockerignore."""
    lines = (line.strip() for line in IGNORED.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def check(text: str) -> list[str]:
    """What is wrong in a Dockerfile."""
    try:
        found = stages(text)
    except ValueError as error:
        return [str(error)]
    return [told for rule in RULES for told in rule(found)]


def _pinned(found: Sequence[Stage]) -> Iterator[str]:
    names = {stage.name for stage in found}
    for stage in found:
        if stage.image not in names and not _EXACT.fullmatch(stage.image):
            yield f"{stage.image} has no exact version"


def _targets(found: Sequence[Stage]) -> Iterator[str]:
    names = {stage.name for stage in found}
    yield from (f"there is no target {name}" for name in TARGETS if name not in names)
    for name in sorted(names & set(TARGETS)):
        line = lineage(name, found)
        users = [one.value for stage in line for one in stage.of("USER")]
        if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
            yield f"{name}: its last USER is {users[-1] if users else 'root'}, not a number above 0"
        if not any(stage.of("HEALTHCHECK") for stage in line):
            yield f"{name}: no HEALTHCHECK"
        if not any(stage.of("ENTRYPOINT") for stage in line):
            yield f"{name}: no ENTRYPOINT"
        for stage in line:
            for one in stage.of("RUN"):
                if re.search(r"\bpip\b|\bg\+\+|\bmake\b", one.value):
                    yield f"{name}: line {one.line} builds in what runs"


def _shell(found: Sequence[Stage]) -> Iterator[str]:
    for stage in found:
        for one in stage.of("RUN"):
            where, text = f"line {one.line}", one.words[0]
            if re.search(r"\b(curl|wget)\b[^|&;]*\|", text):
                yield f"{where}: pipes what it fetches into a program"
            if re.search(r"\bsudo\b|chmod (-R )?777", text):
                yield f"{where}: sudo or chmod 777"
            if "|" in text.replace("||", "") and not any(
                "pipefail" in each.value for each in stage.of("SHELL")
            ):
                yield f"{where}: a pipe without pipefail"
            if "apt-get install" in text:
                if "rm -rf /var/lib/apt/lists/*" not in text or "apt-get update" not in text:
                    yield f"{where}: apt's lists are not fetched and removed in one layer"
                if "--no-install-recommends" not in text or "--yes" not in text:
                    yield f"{where}: apt-get install takes --yes --no-install-recommends"
        yield from (f"line {one.line}: COPY does it" for one in stage.of("ADD"))


def _sources(found: Sequence[Stage]) -> Iterator[str]:
    names, patterns = {stage.name for stage in found}, ignore_patterns()
    for stage in found:
        for one in stage.of("COPY"):
            origin = one.flags.get("from")
            if origin is not None:
                if origin not in names:
                    yield f"line {one.line}: there is no stage {origin}"
                continue
            for source in one.words[:-1]:
                if source in (".", "./") or not (ROOT / source).exists():
                    yield f"line {one.line}: {source} is not there"
                elif ignored(source, patterns):
                    yield f"line {one.line}: .dockerignore leaves out {source}"


def _packages(found: Sequence[Stage]) -> Iterator[str]:
    """pip takes a lock file that was copied, or what was built, and resolves nothing."""
    copied = {
        source
        for stage in found
        for one in stage.of("COPY")
        if "from" not in one.flags
        for source in one.words[:-1]
    }
    for stage in found:
        for one in stage.of("RUN"):
            for words in one.commands:
                if "pip" not in words:
                    continue
                if "--no-deps" not in words:
                    yield f"line {one.line}: pip without --no-deps resolves anew"
                files = re.findall(r"requirements/\S+?\.txt", " ".join(words))
                built = {"dist/*.whl", "."} & set(words)
                if not files and not built:
                    yield f"line {one.line}: pip takes no lock file"
                for file in files:
                    if file not in copied or not (ROOT / file).is_file():
                        yield f"line {one.line}: {file} is no lock file that was copied"


def _secrets(found: Sequence[Stage]) -> Iterator[str]:
    for stage in found:
        for one in stage.instructions:
            if one.name in ("ENV", "ARG", "RUN", "LABEL") and _SECRET.search(one.value):
                yield f"line {one.line}: a secret in the image"


RULES: tuple[Callable[[Sequence[Stage]], Iterator[str]], ...] = (
    _pinned,
    _targets,
    _shell,
    _sources,
    _packages,
    _secrets,
)

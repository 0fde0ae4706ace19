"""`make test-matrix`: checks every model that open_clip lists, and writes what was found for `clipfast models`.

    python scripts/verify_models.py [PART OF A NAME...]

Each model is checked in a process of its own, since the largest take gigabytes. What has been checked with these
releases is not checked again; --again does so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERIFIED = ROOT / "clipfast" / "models" / "verified.json"
PAGE = ROOT / "docs" / "models.md"
RELEASES = ("open_clip_torch", "timm", "torch")

CHECK = """
import json, sys, warnings
warnings.simplefilter("ignore")
from matrix import check
try:
    record = check(sys.argv[1])
except Exception as error:
    record = {"name": sys.argv[1], "failed": f"{type(error).__name__}: {error}"[:500]}
print(json.dumps(record))
"""


def main() -> int:
    import open_clip

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names; all by default")
    parser.add_argument("--again", action="store_true", help="check those, too, that have been")
    arguments = parser.parse_args()
    releases = {name: metadata.version(name) for name in RELEASES}
    known = json.loads(VERIFIED.read_text()) if VERIFIED.exists() else {}
    models = {m["name"]: m for m in known.get("models", [])} if known.get("releases") == releases else {}
    names = [n for n in open_clip.list_models() if not arguments.names or any(part in n for part in arguments.names)]
    bad = []
    for i, name in enumerate(names, start=1):
        if arguments.again or name not in models or "failed" in models[name]:
            models[name] = _checked(name)
            _write(releases, models)
        record = models[name]
        told = record.get("failed") or record.get("refused") or f"{record['kind']}, {record['site']}"
        print(f"{i}/{len(names)} {name}: {told}", flush=True)
        bad += [name] * ("failed" in record)
    _page(models)
    if bad:
        print(f"{len(bad)} of {len(names)} models failed: {', '.join(bad)}", file=sys.stderr)
    print(VERIFIED)
    return 1 if bad else 0


def _checked(name: str) -> dict[str, object]:
    path = ["tests/models", "."]
    code = f"import sys; sys.path[:0] = {path!r}\n" + CHECK
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"name": name, "failed": (done.stderr.splitlines() or ["the process was killed"])[-1][:500]}
    found: dict[str, object] = json.loads(lines[-1])
    return found


def _write(releases: dict[str, str], models: dict[str, dict[str, object]]) -> None:
    written = VERIFIED.with_suffix(".part")
    rows = ",\n  ".join(json.dumps(models[name]) for name in sorted(models))
    written.write_text(f'{{"releases": {json.dumps(releases)},\n "models": [\n  {rows}\n]}}\n')
    written.replace(VERIFIED)


def _page(models: dict[str, dict[str, object]]) -> None:
    """The table of families in docs/models.md."""
    import open_clip

    rows: dict[tuple[str, str], list[dict[str, object]]] = {}
    for record in models.values():
        if "image_error" in record:
            rows.setdefault((str(record["images"]), str(record["site"])), []).append(record)
    lines = [
        "| image tower | pools | architectures | weights tags | methods | embeddings | texts | Grad-ECLIP | bfloat16 |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (images, site), records in sorted(rows.items(), key=lambda item: -len(item[1])):
        tags = sum(len(open_clip.list_pretrained_tags_by_model(str(r["name"]))) for r in records)
        worst = [
            max((float(r[key]) for r in records if key in r), default=None)  # type: ignore[arg-type]
            for key in ("image_error", "text_error", "grad_eclip_features_error", "bfloat16_error")
        ]
        told = " | ".join("" if error is None else f"{error:.0e}" for error in worst)
        methods = max(len(r["methods"]) for r in records)  # type: ignore[arg-type]
        lines.append(f"| {images} | {site} | {len(records)} | {tags} | {methods} | {told} |")
    refused = {str(r["name"]): str(r["refused"]) for r in models.values() if "refused" in r}
    if refused:
        lines += [
            "",
            "Refused, each with its sentence: " + "; ".join(f"{n} ({why})" for n, why in sorted(refused.items())),
        ]
    before, rest = PAGE.read_text().split("<!-- families -->\n")
    after = rest.split("<!-- /families -->")[1]
    PAGE.write_text(before + "<!-- families -->\n" + "\n".join(lines) + "\n<!-- /families -->" + after)


if __name__ == "__main__":
    raise SystemExit(main())

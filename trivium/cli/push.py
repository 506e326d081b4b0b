"""`trivium push`: to the hub."""

from __future__ import annotations

from pathlib import Path

from .options import answer


def push(
    path: Path,
    repo: str,
    *,
    results: tuple[Path, ...] = (),
    public: bool = False,
    license: str | None = None,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Sends a model or adapter directory to the hub, with a model card written from its lineage and results.

    HF_TOKEN says as whom, HF_ENDPOINT where. The repository is private unless --public. A card that is there is kept; its
    generated part is written anew.

    Try:
      trivium push trivium-demo/model me/contacts --dry-run
      trivium push trivium-demo/model me/contacts --results trivium-demo/results/after.json --license apache-2.0

    Parameters
    ----------
    path
        The model or adapter directory.
    repo
        The repository, as owner/name.
    results
        Result files of `trivium eval run` to report in the card.
    public
        Let everyone see it.
    license
        The license that the card names, such as apache-2.0.
    dry_run
        Write the card and list what would be sent; send nothing.
    json
        Answer as JSON.
    """
    from ..recipes.push import push as run

    done = run(path, repo, result_files=results, private=not public, license=license, dry_run=dry_run)
    if json:
        answer({"repo": done.repo, "url": done.url, "files": dict(done.files)}, as_json=True)
    elif done.url is None:
        answer([{"file": name, "bytes": size} for name, size in done.files.items()], as_json=False)
    else:
        answer(done.url, as_json=False)

"""Commands that use a trained run: codes, searches, curation of a data set, export for other libraries."""

import itertools

from lvssl.commands.arguments import parse


def encode(arguments: list[str]) -> None:
    from lvssl.settings.apply import EncodeSettings
    from lvssl.settings.fields import options, shell_line

    settings = parse(EncodeSettings, arguments, "encode")

    from lvssl.codes.file import open_codes
    from lvssl.evaluation.codes import encode as run
    from lvssl.runs.embeddings import is_embeddings

    path = run(settings)
    codes = open_codes(path)
    code = (codes.quantiser or {}).get("code", "bits")
    kind = "codes" if code == "bits" else f"{code} codes"
    bits = f"{codes.bits} bit{'s' * (codes.bits != 1)}"
    written = f"{path}: {codes.count:,} {kind} of {bits}, {path.stat().st_size:,} bytes"
    if is_embeddings(settings.run):  # whose codes are searched from Python
        print(written)
        return
    elsewhere = options({"codes": settings.out} if settings.out else {})
    print(f"{written}; next: {shell_line('lvssl', 'search', settings.run, *elsewhere, '--query')} IMAGE")


def search(arguments: list[str]) -> None:
    from lvssl.settings.apply import SearchSettings

    settings = parse(SearchSettings, arguments, "search")

    from lvssl.evaluation.codes import pictured, print_found, searcher_of, write_csv
    from lvssl.evaluation.codes import search as run

    searcher = searcher_of(settings)
    found = run(settings, searcher)
    if settings.csv:
        count = write_csv(settings.csv, found)
        print(f"{settings.csv}: neighbours of {count:,} {'query' if count == 1 else 'queries'}")
        return
    if settings.page:
        from lvssl.report.pictures import MOST, write_neighbours

        first = list(itertools.islice(found, MOST))
        more = next(found, None) is not None
        title = f"Neighbours of {settings.query.name}"
        print(write_neighbours(settings.page, title, pictured(searcher.run, settings, first), more))
        return
    print_found(found)


def curate(arguments: list[str]) -> None:
    from lvssl.settings.apply import CurateSettings

    settings = parse(CurateSettings, arguments, "curate")

    from lvssl.evaluation.curate import curate as run
    from lvssl.report.pictures import write_curation
    from pipelines.datasets.recognise import set_name

    found = run(settings)
    for name, table in found.tables.items():
        print(f"{found.out / name}.csv: {len(table.lines):,} row{'s' * (len(table.lines) != 1)}")
    if found.run is None:
        return
    data = settings.train or found.run.settings.data
    title = f"{set_name(str(data.resolve())) or data.name}, curated with {settings.run.resolve().name}"
    print(write_curation(found.out / "curate.html", title, found.tables, found.picture))


def export(arguments: list[str]) -> None:
    from lvssl.settings.apply import ExportSettings

    settings = parse(ExportSettings, arguments, "export")

    from lvssl.export import export as run

    pushed = f"; pushed: hf://{settings.push}" if settings.push else ""
    print(f"written: {run(settings)}{pushed}")

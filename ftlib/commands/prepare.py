"""Check a dataset (every row, every image) and split it into train, valid and test in the store."""

from __future__ import annotations

from ftlib import command_line, console, files
from ftlib.site import find_site


def main(argv: list[str]) -> int:
    """`ftlib prepare CONFIG [KEY=VALUE…] [--check]`"""
    command = command_line.parser("prepare", __doc__)
    command.add_argument("--check", action="store_true", help="only check; write nothing")
    command_line.add_config(command)
    parsed = command.parse_intermixed_args(argv)
    site = find_site()
    config = command_line.load(parsed, site).config
    from ftlib.data import prepared

    if parsed.check:
        examples, digests = prepared.check_rows(config)
        console.say(f"{len(examples)} rows and {len(digests)} images are in order")
        return 0
    folder = prepared.prepared_folder(config, site)
    if files.is_complete(folder):
        result = prepared.open_prepared(config, site)
        console.say("already prepared")
    else:
        result = prepared.prepare(config, site)
    rows = [[split, str(entry["rows"]), entry["fingerprint"]] for split, entry in result.facts["splits"].items()]
    console.say(console.table(["split", "rows", "fingerprint"], rows))
    print(folder)
    return 0

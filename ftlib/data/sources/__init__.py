"""Sources: read datasets in their original formats as rows, one module for each source.

Each module has `examples(data) -> Iterator[Example | InvalidRecord]`, which streams: an invalid record becomes an
`InvalidRecord` with its location, and reading continues; only errors that prevent further reading (a missing file,
broken JSON) are UserErrors. Images are not opened. Modules that skip some rows also have `skipped_counts(data)`: reason
→ count. A module without annotation files may have `content_version(data)`, which identifies the rows.
"""

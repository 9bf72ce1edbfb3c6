"""What ftlib does today, held so that a change of its code is seen to change nothing else.

The tests go through what stays when modules move and are renamed: commands, files on disk, and two names that
pickled jobs and pinned code need (`ftlib.submission.launch.run_stage_command`, `ftlib.__main__.main`).

- `test_interface.py`: identities of runs, the config's schema, --help, batch scripts.
- `test_chain.py`, `test_tasks.py`: the chain on the embedded models; what is said, the files, events, losses, reports.
- `test_score.py`: result files of every task.
- `test_big_vision.py`: PaliGemma's numbers against its authors' own code (`make oracle`, `make_big_vision.py`).
- `test_old_state.py`: runs, an evaluation, a merge, prepared data and a job of older code (`make_fixtures.py`).

After a change that is meant, write the goldens anew and read the diff; identities may never change:

    python3 -m pytest tests/golden --update-golden && git diff tests/golden/expected

`identities.json` holds the names that runs ever had, for `tests/test_identity.py`.
"""

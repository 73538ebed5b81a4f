"""One module per operator: `cases(site)` yields shapes; `TABLE` names the table of tiles that `--tune` is for."""

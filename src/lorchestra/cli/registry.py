"""``lorchestra registry``: its verbs, in the order in which a user meets them."""

from __future__ import annotations

import typer

from lorchestra.cli import (
    registry_keep,
    registry_lineage,
    registry_move,
    registry_rebuild,
    registry_store,
    registry_view,
)
from lorchestra.cli.options import either_dash
from lorchestra.cli.registry_canary import app as canary
from lorchestra.cli.registry_feedback import app as feedback
from lorchestra.cli.registry_hub import app as hub
from lorchestra.cli.verbs import Verb, Verbs

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": either_dash},
    help=(
        "Keep adapters in order: names, versions, lineage, aliases that move and roll back, a history that nobody "
        "changes.\n\nName the registry once, `export LORCHESTRA_REGISTRY=~/adapters`, or with `--registry` each time."
    ),
)

KEEP, MOVE, WHOLE, ELSEWHERE = "Adapters", "What goes by which name", "The whole of it", "Other registries"
for name, verb, panel in (
    ("init", registry_store.init, KEEP),
    ("push", registry_store.push, KEEP),
    ("pull", registry_store.pull, KEEP),
    ("list", registry_view.list_versions, KEEP),
    ("show", registry_view.show, KEEP),
    ("lineage", registry_lineage.lineage, KEEP),
    ("diff", registry_lineage.diff, KEEP),
    ("alias", registry_move.alias, MOVE),
    ("unalias", registry_move.unalias, MOVE),
    ("promote", registry_move.promote, MOVE),
    ("rollback", registry_move.rollback, MOVE),
    ("revoke", registry_move.revoke, MOVE),
    ("reinstate", registry_move.reinstate, MOVE),
    ("history", registry_view.history, MOVE),
    ("accept", registry_move.accept, MOVE),
    ("derive", registry_move.derive, MOVE),
    ("verify", registry_keep.verify, WHOLE),
    ("gc", registry_keep.gc, WHOLE),
    ("backup", registry_keep.backup, WHOLE),
    ("restore", registry_keep.restore, WHOLE),
    ("rebuild", registry_rebuild.rebuild, WHOLE),
    ("export", registry_keep.export, ELSEWHERE),
    ("import", registry_keep.import_, ELSEWHERE),
):
    app.command(name, cls=Verb, rich_help_panel=panel)(verb)
app.add_typer(canary, name="canary", rich_help_panel=MOVE)
app.add_typer(feedback, name="feedback", rich_help_panel=MOVE)
app.add_typer(hub, name="hub", rich_help_panel=ELSEWHERE)

"""``{glue:text}`` as a link to where a value comes from, if `cemb.report.provenance.glue` says so."""

from docutils import nodes
from myst_nb.ext.glue.roles import PasteTextRole
from myst_nb.ext.glue.utils import retrieve_glue_data
from sphinx import addnodes


class LinkedTextRole(PasteTextRole):
    def run(self):
        found, messages = super().run()
        if not found:  # it has warned
            return found, messages
        key = self.text.rsplit(":", 1)[0]
        target = retrieve_glue_data(self.document, key).metadata.get("provenance")
        if target is None:
            return found, messages
        reference = addnodes.pending_xref(
            "",
            *found,
            refdomain="std",
            reftype="ref",
            reftarget=nodes.fully_normalize_name(target),
            refdoc=self.document.settings.env.docname,
            refexplicit=True,
            refwarn=True,
        )
        self.set_source_info(reference)
        return [nodes.inline("", "", reference, classes=["measured"])], messages


def setup(app):
    app.setup_extension("myst_nb")  # has the domain
    app.add_role_to_domain("glue", "text", LinkedTextRole(), override=True)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

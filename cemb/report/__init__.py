"""From records to the pages of the book. It only reads records."""

from importlib.util import find_spec

if _missing := [name for name in ("matplotlib", "pandas") if find_spec(name) is None]:
    raise ModuleNotFoundError(f"cemb.report needs {' and '.join(_missing)}: pip install 'cemb[study]'")

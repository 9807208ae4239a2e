"""Everything that depends on transformers: patching, setting parameters, caches, generation, loading."""

from toptheta.models import versions as versions  # checked before anything of transformers is imported

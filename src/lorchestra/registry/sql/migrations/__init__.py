"""How catalogs of earlier versions become those of this one; run by :mod:`lorchestra.registry.sql.database`."""

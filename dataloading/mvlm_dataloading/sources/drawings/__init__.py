"""Drawings and their names: emoji and icons, from files of packages. SVGs are rendered."""

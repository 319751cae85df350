"""Drawings and their names: emoji, icons, clip art and stamps, from files of packages. SVGs are rendered."""

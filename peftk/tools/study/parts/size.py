TITLE="size"

TITLE="capacity"

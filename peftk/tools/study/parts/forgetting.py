TITLE="forgetting"

package local

import (
	"cmp"
	"context"
	"os"
	"slices"
	"strings"

	"graindisk/backend"
)

// List implements backend.Store. It reads only the folders that can hold what is asked for, each
// of them whole.
func (s *Store) List(ctx context.Context, prefix, after string, max int) ([]backend.Info, bool, error) {
	w := walk{store: s, ctx: ctx, prefix: prefix, after: after, max: max}
	if err := w.run(); err != nil {
		return nil, false, s.fail("list", prefix, err)
	}
	return w.found, w.more, nil
}

// walk goes through the folders in byte order of the keys until it has found max objects and knows
// whether there is another one.
type walk struct {
	store         *Store
	ctx           context.Context
	prefix, after string
	max           int

	found []backend.Info
	more  bool
}

func (w *walk) run() error {
	if err := backend.CheckList(w.prefix, w.max); err != nil {
		return refusal{err}
	}
	if err := w.store.ready(w.ctx); err != nil {
		return err
	}
	if _, err := os.Lstat(w.store.path(lockName)); err != nil {
		return err // the directory itself is away: not an empty store
	}
	return w.folder(w.prefix[:strings.LastIndexByte(w.prefix, '/')+1])
}

// folder walks one folder; rel is "" or ends in a slash.
func (w *walk) folder(rel string) error {
	entries, err := os.ReadDir(w.store.path(rel))
	if isNoObject(err) {
		return nil
	}
	if err != nil {
		return err
	}
	// Byte order of keys is that of the names when a folder's name has its slash: "a-b" < "a/b" < "a0".
	keyOf := func(e os.DirEntry) string {
		if e.IsDir() {
			return rel + e.Name() + "/"
		}
		return rel + e.Name()
	}
	slices.SortFunc(entries, func(a, b os.DirEntry) int { return cmp.Compare(keyOf(a), keyOf(b)) })
	for _, e := range entries {
		if err := w.ctx.Err(); err != nil || w.more {
			return err
		}
		if err := w.entry(keyOf(e), e); err != nil {
			return err
		}
	}
	return nil
}

func (w *walk) entry(key string, e os.DirEntry) error {
	if backend.CheckKey(strings.TrimSuffix(key, "/")) != nil {
		return nil // .tmp, and what other programs may have put here
	}
	if e.IsDir() {
		within := strings.HasPrefix(key, w.prefix) || strings.HasPrefix(w.prefix, key)
		passed := key < w.after && !strings.HasPrefix(w.after, key)
		if !within || passed {
			return nil
		}
		return w.folder(key)
	}
	if !strings.HasPrefix(key, w.prefix) || key <= w.after {
		return nil
	}
	st, err := e.Info()
	if isNoObject(err) || err == nil && !st.Mode().IsRegular() {
		return nil // deleted meanwhile, or no object
	}
	if err != nil {
		return err
	}
	if len(w.found) == w.max {
		w.more = true
		return nil
	}
	w.found = append(w.found, infoOf(key, st))
	return nil
}

package pool

import (
	"context"

	"graindisk/backend"
	"graindisk/backend/backendtest"
	"graindisk/internal/crashtest"
)

// scheduled is a target whose requests, and the replies to them, take effect when the scheduler says so.
// What befalls a request is drawn only then, so that the draws come in the scheduler's order.
type scheduled struct {
	*backendtest.Faulty
	sched *crashtest.Sched
}

func (s scheduled) pass(op, key string) func() {
	s.sched.Park(op + ":" + s.String() + " " + key)
	return func() { s.sched.Park("reply:" + s.String() + " " + op + " " + key) }
}

func (s scheduled) Put(ctx context.Context, key string, body []byte, c backend.Cond) (string, error) {
	defer s.pass("put", key)()
	return s.Faulty.Put(ctx, key, body, c)
}

func (s scheduled) Get(ctx context.Context, key string, max int64) ([]byte, string, error) {
	defer s.pass("get", key)()
	return s.Faulty.Get(ctx, key, max)
}

func (s scheduled) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	defer s.pass("read", key)()
	return s.Faulty.ReadAt(ctx, key, p, off)
}

func (s scheduled) Delete(ctx context.Context, key string) error {
	defer s.pass("delete", key)()
	return s.Faulty.Delete(ctx, key)
}

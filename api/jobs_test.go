package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	"graindisk/internal/jobs"
	"graindisk/pool"
)

// The fake gateway's jobs: one repair of main that is under way, or another that starts.
func (*fakeGateway) StartRepair(name string, r RepairRequest) (jobs.Job, error) {
	switch {
	case name != "main":
		return jobs.Job{}, fmt.Errorf("pool %s: %w", name, ErrNoPool)
	case r.BytesPerSecond == 1<<20:
		return jobs.Job{}, jobs.ErrRunning
	}
	return jobs.Job{ID: "repair-1", State: jobs.Running, Progress: jobs.Progress{BytesTotal: r.BytesPerSecond}}, nil
}

func (*fakeGateway) ReplaceTarget(_ context.Context, _, target string, add bool) (pool.TargetChange, error) {
	switch {
	case target == "used":
		return pool.TargetChange{}, pool.ErrTargetInUse
	case target == "unknown":
		return pool.TargetChange{}, pool.ErrNoTarget
	case add:
		return pool.TargetChange{Target: target, New: 9}, nil
	}
	return pool.TargetChange{Target: target, Old: 1, New: 9}, nil
}

func (g *fakeGateway) Jobs() []jobs.Job {
	j, _ := g.Job("repair-1")
	return []jobs.Job{j}
}

func (*fakeGateway) Job(id string) (jobs.Job, error) {
	if id != "repair-1" {
		return jobs.Job{}, fmt.Errorf("job %s: %w", id, jobs.ErrNoJob)
	}
	return jobs.Job{ID: id, State: jobs.Done, Report: pool.RepairReport{Restored: 3}}, nil
}

func (g *fakeGateway) CancelJob(id string) (jobs.Job, error) { return g.Job(id) }

func TestLongWork(t *testing.T) {
	c, _ := start(t)
	ctx := context.Background()
	j, err := c.StartRepair(ctx, "main", RepairRequest{BytesPerSecond: 77 << 10})
	if err != nil || j.ID != "repair-1" || j.State != jobs.Running || j.Progress.BytesTotal != 77<<10 || j.Report != nil {
		t.Errorf("%+v, %v", j, err)
	}
	for rate, want := range map[int64]error{1 << 20: jobs.ErrRunning, -1: ErrBadRequest} {
		if _, err := c.StartRepair(ctx, "main", RepairRequest{BytesPerSecond: rate}); !errors.Is(err, want) {
			t.Errorf("rate %d: %v", rate, err)
		}
	}
	if _, err := c.StartRepair(ctx, "other", RepairRequest{}); !errors.Is(err, ErrNoPool) {
		t.Error(err)
	}
	var rep pool.RepairReport
	j, err = c.Job(ctx, "repair-1")
	if err == nil {
		err = json.Unmarshal(j.Report, &rep)
	}
	if err != nil || rep.Restored != 3 {
		t.Errorf("%+v, %v", j, err)
	}
	if js, err := c.Jobs(ctx); err != nil || len(js) != 1 || js[0].ID != "repair-1" {
		t.Errorf("%+v, %v", js, err)
	}
	for _, get := range []func(context.Context, string) (Job, error){c.Job, c.CancelJob} {
		if _, err := get(ctx, "nonsense"); !errors.Is(err, jobs.ErrNoJob) {
			t.Error(err)
		}
	}
	for _, add := range []bool{false, true} {
		if ch, err := c.ReplaceTarget(ctx, "main", "t1", add); err != nil || ch.New != 9 || (ch.Old == 0) != add {
			t.Errorf("%+v, %v", ch, err)
		}
	}
	for name, want := range map[string]error{"used": pool.ErrTargetInUse, "unknown": pool.ErrNoTarget} {
		if _, err := c.ReplaceTarget(ctx, "main", name, false); !errors.Is(err, want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

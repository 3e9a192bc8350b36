package jobs

import (
	"context"
	"errors"
	"sync"
	"testing"
)

// await is the job once it has ended.
func await(t *testing.T, r *Runner, id string) Job {
	t.Helper()
	r.wg.Wait()
	j, err := r.Get(id)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func TestAJobRunsToItsEnd(t *testing.T) {
	boom := errors.New("boom")
	for name, c := range map[string]struct {
		work  Work
		state State
		err   string
	}{
		"done":   {func(context.Context, func(Progress)) (any, error) { return 7, nil }, Done, ""},
		"failed": {func(context.Context, func(Progress)) (any, error) { return 7, boom }, Failed, "boom"},
		"panic":  {func(context.Context, func(Progress)) (any, error) { panic("oh") }, Failed, "panic: oh"},
		"cancelled by somebody else": {func(context.Context, func(Progress)) (any, error) { return 7, context.Canceled },
			Failed, "context canceled"},
	} {
		r := New()
		j, err := r.Start("repair", "main", c.work)
		if err != nil || j.State != Running || j.Ended != nil {
			t.Fatalf("%s: %+v, %v", name, j, err)
		}
		j = await(t, r, j.ID)
		if j.State != c.state || j.Error != c.err || j.Ended == nil {
			t.Errorf("%s: %+v", name, j)
		}
		if name != "panic" && j.Report != 7 {
			t.Errorf("%s: the report is %v", name, j.Report)
		}
	}
}

func TestOneOfAKindAtATime(t *testing.T) {
	r := New()
	defer r.Close()
	told := make(chan struct{})
	wait := func(ctx context.Context, tell func(Progress)) (any, error) {
		tell(Progress{ItemsDone: 3, ItemsTotal: 9})
		told <- struct{}{}
		<-ctx.Done()
		return "half", ctx.Err()
	}
	j, err := r.Start("repair", "main", wait)
	if err != nil {
		t.Fatal(err)
	}
	<-told
	if same, err := r.Start("repair", "main", wait); !errors.Is(err, ErrRunning) || same.ID != j.ID {
		t.Errorf("a second one began: %+v, %v", same, err)
	}
	for _, other := range [][2]string{{"repair", "other"}, {"scrub", "main"}} {
		if _, err := r.Start(other[0], other[1], wait); err != nil {
			t.Errorf("%v: %v", other, err)
		}
		<-told
	}
	if got, _ := r.Get(j.ID); got.Progress.ItemsDone != 3 {
		t.Errorf("progress: %+v", got.Progress)
	}
	if _, err := r.Cancel("nonsense"); !errors.Is(err, ErrNoJob) {
		t.Errorf("an unknown job: %v", err)
	}
	if _, err := r.Cancel(j.ID); err != nil {
		t.Fatal(err)
	}
	r.Close()
	for _, j := range r.List() {
		if j.State != Cancelled || j.Error != "" || j.Report != "half" {
			t.Errorf("%+v", j)
		}
	}
	if _, err := r.Start("repair", "main", wait); !errors.Is(err, ErrClosed) {
		t.Errorf("began after the end: %v", err)
	}
}

func TestEndedJobsAreForgottenInTime(t *testing.T) {
	r := New()
	defer r.Close()
	stay, err := r.Start("stay", "x", func(ctx context.Context, _ func(Progress)) (any, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 * kept {
		var ended sync.WaitGroup
		ended.Add(1)
		j, err := r.Start("short", "x", func(context.Context, func(Progress)) (any, error) { defer ended.Done(); return nil, nil })
		if err != nil {
			t.Fatal(err)
		}
		ended.Wait()
		for j.State == Running { // its end is noted a moment later
			j, _ = r.Get(j.ID)
		}
	}
	if n := len(r.List()); n != kept {
		t.Errorf("%d jobs are remembered, want %d", n, kept)
	}
	if j, err := r.Get(stay.ID); err != nil || j.State != Running {
		t.Errorf("a running one was forgotten: %+v, %v", j, err)
	}
}

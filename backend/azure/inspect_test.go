package azure

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"graindisk/backend"
)

// TestInspect gives an account one setting at a time.
func TestInspect(t *testing.T) {
	const list = `<?xml version="1.0"?><EnumerationResults><Blobs><Blob><Name>k</Name><Properties><AccessTier>%s</AccessTier></Properties></Blob></Blobs></EnumerationResults>`
	const service = `<?xml version="1.0"?><StorageServiceProperties><DeleteRetentionPolicy><Enabled>%v</Enabled><Days>7</Days></DeleteRetentionPolicy></StorageServiceProperties>`
	type settings struct {
		header          map[string]string // of whatever is asked
		tier            string
		soft, versioned bool
		refuse          bool
	}
	for name, c := range map[string]struct {
		settings
		finding   string // name of the one there must be
		dangerous bool
		text      string // in it
	}{
		"nothing":         {},
		"legal hold":      {settings{header: map[string]string{"x-ms-has-legal-hold": "true"}}, "immutability", true, "root cannot be changed"},
		"policy":          {settings{header: map[string]string{"x-ms-has-immutability-policy": "true"}}, "immutability", true, "root cannot be changed"},
		"version lock":    {settings{header: map[string]string{"x-ms-immutable-storage-with-versioning-enabled": "true"}}, "immutability", true, "immutable versions"},
		"public":          {settings{header: map[string]string{"x-ms-blob-public-access": "blob"}}, "public access", true, "anyone"},
		"leased":          {settings{header: map[string]string{"x-ms-lease-state": "leased"}}, "lease", false, "not affected"},
		"namespace":       {settings{header: map[string]string{"x-ms-is-hns-enabled": "true"}}, "hierarchical namespace", true, "byte order"},
		"geo-replication": {settings{header: map[string]string{"x-ms-sku-name": "Standard_RAGRS"}}, "replication", false, "failover"},
		"soft delete":     {settings{soft: true}, "soft delete", false, "7 days"},
		"archive":         {settings{tier: "Archive"}, "access tier", true, "archive"},
		"cool":            {settings{tier: "Cool"}, "access tier", false, "Cool"},
		"versions":        {settings{versioned: true}, "versioning", true, "old versions"},
		"nothing allowed": {settings{refuse: true}, "soft delete", false, "not to be seen"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, _ := fakeStore(t, func(w http.ResponseWriter, r *http.Request) {
				q := r.URL.Query()
				for k, v := range c.header {
					w.Header().Set(k, v)
				}
				if c.versioned {
					w.Header().Set("x-ms-version-id", "2026-01-01T00:00:00.0000000Z")
				}
				switch {
				case r.Method == http.MethodPut:
					w.Header().Set("ETag", `"1"`)
					w.WriteHeader(http.StatusCreated)
				case c.refuse:
					answer(http.StatusForbidden, "AuthorizationPermissionMismatch")(w, r)
				case q.Get("restype") == "service":
					fmt.Fprintf(w, service, c.soft)
				case q.Get("comp") == "list":
					tier := c.tier
					if tier == "" {
						tier = "Hot"
					}
					fmt.Fprintf(w, list, tier)
				}
			})
			if _, err := s.Put(t.Context(), "k", nil, backend.Cond{}); err != nil {
				t.Fatal(err)
			}
			found, err := s.Inspect(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			last := found[len(found)-1]
			if last.Name != "rules of the account" || last.Dangerous || !strings.Contains(last.Text, "not to be seen") {
				t.Errorf("what cannot be seen is not said: %+v", found)
			}
			rest, want := found[:len(found)-1], 1
			switch name {
			case "nothing":
				want = 0
			case "nothing allowed":
				want = 4 // each of the four places says so
			}
			if len(rest) != want {
				t.Errorf("%d findings, want %d: %+v", len(rest), want, rest)
			}
			seen := want == 0
			for _, f := range rest {
				seen = seen || f.Name == c.finding && f.Dangerous == c.dangerous && strings.Contains(f.Text, c.text)
			}
			if !seen {
				t.Errorf("no %q (dangerous: %v, %q) in %+v", c.finding, c.dangerous, c.text, rest)
			}
		})
	}
}

func TestInspectSAS(t *testing.T) {
	now := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	for name, c := range map[string]struct {
		query, text string
		dangerous   bool
	}{
		"no signature":     {"", "", false},
		"far end":          {"sig=x&sp=racwdl&se=2027-05-01T12:00:00Z", "it ends at 2027-05-01T12:00:00Z", false},
		"far end, no time": {"sig=x&sp=rwdl&se=2027-05-01", "it ends at 2027-05-01T00:00:00Z", false},
		"near end":         {"sig=x&sp=rwdl&se=2026-05-07T12:00Z", "nothing can be stored", true},
		"past its end":     {"sig=x&sp=rwdl&se=2026-04-01T12:00:00Z", "nothing can be stored", true},
		"read only":        {"sig=x&sp=rl&se=2027-05-01T12:00:00Z", `lacks "wd"`, true},
		"stored policy":    {"sig=x&si=policy", "stored policy", false},
		"unreadable":       {"sig=x&sp=rwdl&se=soon", "cannot be read", false},
	} {
		found := inspectSAS("https://a.blob.core.windows.net/c?"+c.query, now)
		text, dangerous := "", false
		for _, f := range found {
			text += f.Text + "\n"
			dangerous = dangerous || f.Dangerous
		}
		if dangerous != c.dangerous || !strings.Contains(text, c.text) || (text == "") != (c.query == "") {
			t.Errorf("%s: %+v", name, found)
		}
	}
}

// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC8183, IJobEscrow} from "../src/IJobEscrow.sol";
import {Base} from "./Base.sol";
import {Vm, vm} from "./Vm.sol";

/// @notice Plain ERC-8183 jobs: every status, every caller, every function, and each SHALL of the text.
/// Here the client is `buyer`, the provider `seller` and the evaluator `arbiter`.
contract PlainTest is Base {
    uint256 private constant BUDGET = 500;
    uint256 private constant EXPIRY = START + 1 days;

    enum Act {
        SetProvider,
        SetBudget,
        Fund,
        FundOther,
        Submit,
        Complete,
        Reject,
        ClaimRefund
    }

    struct State {
        string name;
        uint256 id;
        IERC8183.Status status;
        bool hasProvider;
        bool hasBudget;
        bool expired;
    }

    // ------------------------------------------------------------------------------------ matrix

    function test_matrix() public {
        uint256 empty = vm.snapshotState();
        _try(State("no job", 1, IERC8183.Status.Open, false, false, false), false);

        uint256 id = _create(address(0));
        _try(State("open", id, IERC8183.Status.Open, false, false, false), true);
        _setBudget(buyer, id);
        _try(State("open with budget", id, IERC8183.Status.Open, false, true, false), true);

        vm.revertToState(empty);
        id = _create(seller);
        _try(State("open with provider", id, IERC8183.Status.Open, true, false, false), true);
        _setBudget(seller, id);
        uint256 open_ = vm.snapshotState();
        _try(State("open with both", id, IERC8183.Status.Open, true, true, false), true);
        vm.prank(buyer);
        escrow.reject(id, RESULT, "");
        _try(State("rejected while open", id, IERC8183.Status.Rejected, true, true, false), true);

        vm.revertToState(open_);
        _fund(id);
        uint256 funded = vm.snapshotState();
        _try(State("funded", id, IERC8183.Status.Funded, true, true, false), true);
        vm.prank(arbiter);
        escrow.reject(id, RESULT, "");
        _try(State("rejected while funded", id, IERC8183.Status.Rejected, true, true, false), true);
        vm.revertToState(funded);
        vm.warp(EXPIRY);
        escrow.claimRefund(id);
        _try(State("expired while funded", id, IERC8183.Status.Expired, true, true, false), true);

        vm.revertToState(funded);
        submit(id);
        uint256 submitted = vm.snapshotState();
        _try(State("submitted", id, IERC8183.Status.Submitted, true, true, false), true);
        vm.prank(arbiter);
        escrow.complete(id, RESULT, "");
        _try(State("completed", id, IERC8183.Status.Completed, true, true, false), true);
        vm.revertToState(submitted);
        vm.prank(arbiter);
        escrow.reject(id, RESULT, "");
        _try(State("rejected while submitted", id, IERC8183.Status.Rejected, true, true, false), true);
        vm.revertToState(submitted);
        vm.warp(EXPIRY);
        escrow.claimRefund(id);
        _try(State("expired while submitted", id, IERC8183.Status.Expired, true, true, false), true);
    }

    /// @dev The text, row by row. There is no Open -> Expired.
    function _expected(State memory s, address caller, Act act)
        private
        view
        returns (bool allowed, IERC8183.Status status)
    {
        bool client = caller == buyer;
        bool provider = caller == seller && s.hasProvider;
        bool evaluator = caller == arbiter;
        bool open_ = s.status == IERC8183.Status.Open;
        bool funded = s.status == IERC8183.Status.Funded;
        bool submitted = s.status == IERC8183.Status.Submitted;
        if (act == Act.SetProvider) return (open_ && client && !s.hasProvider, s.status);
        if (act == Act.SetBudget) return (open_ && (client || provider), s.status);
        if (act == Act.Fund) return (open_ && client && s.hasProvider && s.hasBudget, IERC8183.Status.Funded);
        if (act == Act.Submit) return (funded && provider, IERC8183.Status.Submitted);
        if (act == Act.Complete) return (submitted && evaluator, IERC8183.Status.Completed);
        if (act == Act.Reject) {
            return ((open_ && client) || ((funded || submitted) && evaluator), IERC8183.Status.Rejected);
        }
        if (act == Act.ClaimRefund) return ((funded || submitted) && s.expired, IERC8183.Status.Expired);
        return (false, s.status); // FundOther: never.
    }

    function _try(State memory s, bool exists) private {
        uint256 now_ = block.timestamp;
        for (uint256 late = 0; late < 3; ++late) {
            // One second before expiry, at expiry, and long after.
            uint256[3] memory times = [EXPIRY - 1, EXPIRY, EXPIRY + 365 days];
            vm.warp(times[late]);
            s.expired = late > 0;
            for (uint256 caller = 0; caller < 4; ++caller) {
                for (uint256 act = 0; act <= uint256(type(Act).max); ++act) {
                    this.tryCell(s, exists, [buyer, seller, arbiter, stranger][caller], Act(act));
                }
            }
        }
        vm.warp(now_);
    }

    function tryCell(State memory s, bool exists, address caller, Act act) external {
        string memory cell = string.concat(s.name, ", ", vm.toString(caller), ", act ", vm.toString(uint256(act)));
        (bool allowed, IERC8183.Status status) = _expected(s, caller, act);
        allowed = allowed && exists;
        uint256 state = vm.snapshotState();
        (int256 client, int256 provider) = (int256(token.balanceOf(buyer)), int256(token.balanceOf(seller)));
        vm.prank(caller);
        (bool done,) = address(escrow).call(_callOf(s.id, act));
        vm.assertTrue(done == allowed, string.concat(cell, allowed ? ": refused" : ": allowed"));
        client = int256(token.balanceOf(buyer)) - client;
        provider = int256(token.balanceOf(seller)) - provider;
        (int256 toClient, int256 toProvider) = done ? _movesOf(s.status, act) : (int256(0), int256(0));
        vm.assertEq(client, toClient, string.concat(cell, ": client"));
        vm.assertEq(provider, toProvider, string.concat(cell, ": provider"));
        if (!done) status = s.status;
        vm.assertEq(uint256(statusOf(s.id)), uint256(status), string.concat(cell, ": status"));
        vm.revertToState(state);
    }

    function _movesOf(IERC8183.Status from, Act act) private pure returns (int256 toClient, int256 toProvider) {
        bool holds = from == IERC8183.Status.Funded || from == IERC8183.Status.Submitted;
        if (act == Act.Fund) toClient = -int256(BUDGET);
        if (holds && (act == Act.Reject || act == Act.ClaimRefund)) toClient = int256(BUDGET);
        if (act == Act.Complete) toProvider = int256(BUDGET);
    }

    function _callOf(uint256 id, Act act) private view returns (bytes memory) {
        if (act == Act.SetProvider) return abi.encodeCall(IERC8183.setProvider, (id, seller, "x"));
        if (act == Act.SetBudget) return abi.encodeCall(IERC8183.setBudget, (id, BUDGET, "x"));
        if (act == Act.Fund) return abi.encodeCall(IERC8183.fund, (id, BUDGET, "x"));
        if (act == Act.FundOther) return abi.encodeCall(IERC8183.fund, (id, BUDGET + 1, ""));
        if (act == Act.Submit) return abi.encodeCall(IERC8183.submit, (id, RESULT, "x"));
        if (act == Act.Complete) return abi.encodeCall(IERC8183.complete, (id, RESULT, "x"));
        if (act == Act.Reject) return abi.encodeCall(IERC8183.reject, (id, RESULT, "x"));
        return abi.encodeCall(IERC8183.claimRefund, (id));
    }

    // ---------------------------------------------------------------------------------- creation

    function test_createChecks() public {
        vm.expectPartialRevert(IERC8183.BadEvaluator.selector);
        escrow.createJob(seller, address(0), EXPIRY, "", address(0));
        vm.expectPartialRevert(IERC8183.BadEvaluator.selector);
        escrow.createJob(seller, address(escrow), EXPIRY, "", address(0));
        vm.expectPartialRevert(IERC8183.BadProvider.selector);
        escrow.createJob(address(escrow), arbiter, EXPIRY, "", address(0));
        vm.expectPartialRevert(IERC8183.BadProvider.selector);
        escrow.createJob(arbiter, arbiter, EXPIRY, "", address(0));
        vm.expectPartialRevert(IERC8183.BadExpiry.selector);
        escrow.createJob(seller, arbiter, START, "", address(0));
        vm.expectPartialRevert(IERC8183.BadExpiry.selector);
        escrow.createJob(seller, arbiter, uint256(type(uint40).max) + 1, "", address(0));
        vm.expectPartialRevert(IERC8183.HookNotSupported.selector);
        escrow.createJob(seller, arbiter, EXPIRY, "", stranger);
        vm.assertEq(escrow.jobCounter(), 0, "nothing was made");
    }

    function test_setProviderChecks() public {
        uint256 id = _create(address(0));
        address[3] memory wrong = [address(0), address(escrow), arbiter];
        for (uint256 i = 0; i < 3; ++i) {
            vm.prank(buyer);
            vm.expectRevert(abi.encodeWithSelector(IERC8183.BadProvider.selector, wrong[i]));
            escrow.setProvider(id, wrong[i], "");
        }
    }

    function test_budgetBounds() public {
        uint256 id = _create(seller);
        vm.prank(buyer);
        vm.expectPartialRevert(IERC8183.BadBudget.selector);
        escrow.setBudget(id, uint256(1) << 128, "");
        vm.prank(buyer);
        escrow.setBudget(id, 0, "");
        vm.prank(buyer);
        vm.expectPartialRevert(IERC8183.BadBudget.selector);
        escrow.fund(id, 0, "");
    }

    /// @notice The provider raises the budget just before the client funds: the client is not robbed.
    function test_budgetChangedUnderTheClient() public {
        uint256 id = _create(seller);
        _setBudget(buyer, id);
        vm.prank(seller);
        escrow.setBudget(id, 900, "");
        vm.prank(buyer);
        vm.expectRevert(abi.encodeWithSelector(IERC8183.BudgetChanged.selector, BUDGET, 900));
        escrow.fund(id, BUDGET, "");
    }

    /// @notice The evaluator may be the client; money goes only to provider or client.
    function test_clientAsEvaluator() public {
        vm.prank(buyer);
        uint256 id = escrow.createJob(seller, buyer, EXPIRY, "mine", address(0));
        _setBudget(buyer, id);
        _fund(id);
        submit(id);
        vm.prank(buyer);
        escrow.complete(id, RESULT, "");
        vm.assertEq(token.balanceOf(seller), 1_000_000 + BUDGET, "all, no fee");
    }

    /// @notice The known fund drain: an Open job with a budget and past its expiry pays nobody.
    function test_openJobNeverPays() public {
        uint256 victim = _create(seller);
        _setBudget(buyer, victim);
        _fund(victim);
        vm.startPrank(stranger);
        uint256 id = escrow.createJob(address(0), arbiter, EXPIRY, "", address(0));
        escrow.setBudget(id, BUDGET, "");
        vm.warp(EXPIRY + 1);
        vm.expectRevert(abi.encodeWithSelector(IERC8183.WrongStatus.selector, id, IERC8183.Status.Open));
        escrow.claimRefund(id);
        escrow.reject(id, RESULT, "");
        vm.stopPrank();
        vm.assertEq(token.balanceOf(stranger), 0, "nothing");
        vm.assertEq(token.balanceOf(address(escrow)), BUDGET, "the victim's money is there");
    }

    function test_getJob() public {
        uint256 id = _create(seller);
        _setBudget(buyer, id);
        _fund(id);
        vm.warp(START + 9);
        submit(id);
        IERC8183.JobView memory job = escrow.getJob(id);
        vm.assertEq(job.id, 1, "counted from one");
        vm.assertEq(job.client, buyer, "client");
        vm.assertEq(job.provider, seller, "provider");
        vm.assertEq(job.evaluator, arbiter, "evaluator");
        vm.assertEq(job.description, "a plain job", "description");
        vm.assertEq(job.budget, BUDGET, "budget");
        vm.assertEq(job.expiredAt, EXPIRY, "expiry");
        vm.assertEq(uint256(job.status), uint256(IERC8183.Status.Submitted), "status");
        vm.assertEq(job.hook, address(0), "hook");
        vm.assertEq(job.submittedAt, START + 9, "submitted");
        vm.assertEq(job.deliverable, RESULT, "deliverable");
        vm.expectRevert(abi.encodeWithSelector(IERC8183.JobNotFound.selector, 2));
        escrow.getJob(2);
    }

    /// @notice Selectors of the text (ABI A), and its topics.
    function test_abi() public pure {
        vm.assertTrue(IERC8183.createJob.selector == 0x41528812, "createJob");
        vm.assertTrue(IERC8183.setProvider.selector == 0xc9a84bb9, "setProvider");
        vm.assertTrue(IERC8183.setBudget.selector == 0xdd4ae9d4, "setBudget");
        vm.assertTrue(IERC8183.fund.selector == 0xd2e13f50, "fund");
        vm.assertTrue(IERC8183.submit.selector == 0x9e63798d, "submit");
        vm.assertTrue(IERC8183.complete.selector == 0xd75bbdf3, "complete");
        vm.assertTrue(IERC8183.reject.selector == 0x41dd26f5, "reject");
        vm.assertTrue(IERC8183.claimRefund.selector == 0x5b7baf64, "claimRefund");
        vm.assertTrue(bytes4(IERC8183.JobCreated.selector) == 0xb0f0239b, "JobCreated");
        vm.assertTrue(bytes4(IERC8183.BudgetSet.selector) == 0x869e2577, "BudgetSet");
        vm.assertTrue(bytes4(IERC8183.JobFunded.selector) == 0xe3fbcc1e, "JobFunded");
        vm.assertTrue(bytes4(IERC8183.JobSubmitted.selector) == 0x80c17db7, "JobSubmitted");
        vm.assertTrue(bytes4(IERC8183.JobCompleted.selector) == 0x0fd54bd3, "JobCompleted");
        vm.assertTrue(bytes4(IERC8183.JobRejected.selector) == 0xae7362b1, "JobRejected");
        vm.assertTrue(bytes4(IERC8183.JobExpired.selector) == 0x97237956, "JobExpired");
        vm.assertTrue(bytes4(IERC8183.PaymentReleased.selector) == 0x21d71db5, "PaymentReleased");
        vm.assertTrue(bytes4(IERC8183.Refunded.selector) == 0x7ca5472b, "Refunded");
    }

    function test_logsOfAJob() public {
        vm.recordLogs();
        uint256 id = _create(address(0));
        vm.prank(buyer);
        escrow.setProvider(id, seller, "");
        _setBudget(buyer, id);
        _fund(id);
        submit(id);
        vm.prank(arbiter);
        escrow.complete(id, RESULT, "");
        // A token's transfer follows the funding and the payment.
        bytes32[8] memory topics = [
            IERC8183.JobCreated.selector,
            IERC8183.ProviderSet.selector,
            IERC8183.BudgetSet.selector,
            IERC8183.JobFunded.selector,
            0,
            IERC8183.JobSubmitted.selector,
            IERC8183.JobCompleted.selector,
            IERC8183.PaymentReleased.selector
        ];
        Vm.Log[] memory logs = vm.getRecordedLogs();
        vm.assertEq(logs.length, 9, "seven of ours and two of the token");
        for (uint256 i = 0; i < 8; ++i) {
            if (topics[i] != 0) vm.assertEq(logs[i].topics[0], topics[i], "topic");
        }
    }

    function test_logsOfTheOtherEnds() public {
        uint256 id = _create(seller);
        _setBudget(buyer, id);
        _fund(id);
        uint256 funded = vm.snapshotState();
        vm.recordLogs();
        vm.prank(arbiter);
        escrow.reject(id, RESULT, "");
        Vm.Log[] memory logs = vm.getRecordedLogs();
        vm.assertEq(logs[0].topics[0], IERC8183.JobRejected.selector, "JobRejected");
        vm.assertEq(logs[1].topics[0], IERC8183.Refunded.selector, "Refunded");

        vm.revertToState(funded);
        vm.warp(EXPIRY);
        escrow.claimRefund(id);
        logs = vm.getRecordedLogs();
        vm.assertEq(logs[0].topics[0], IERC8183.JobExpired.selector, "JobExpired");
        vm.assertEq(logs[1].topics[0], IERC8183.Refunded.selector, "Refunded");
    }

    // ------------------------------------------------------------------------------------- steps

    function _create(address provider) private returns (uint256) {
        vm.prank(buyer);
        return escrow.createJob(provider, arbiter, EXPIRY, "a plain job", address(0));
    }

    function _setBudget(address by, uint256 id) private {
        vm.prank(by);
        escrow.setBudget(id, BUDGET, "");
    }

    function _fund(uint256 id) private {
        vm.prank(buyer);
        escrow.fund(id, BUDGET, "");
    }
}

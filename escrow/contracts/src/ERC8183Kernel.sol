// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {Strings} from "@openzeppelin/contracts/utils/Strings.sol";

import {IJobEscrow} from "./IJobEscrow.sol";

/// @title The ERC-8183 state machine and the only code that moves money
/// @notice Holds plain jobs whole, and of a deal the part that is a job. It never knows who the
/// buyer of a deal is: the money of a deal leaves only at the word of the evaluator above.
abstract contract ERC8183Kernel is IJobEscrow, ReentrancyGuardTransient {
    using SafeERC20 for IERC20;

    uint8 internal constant PLAIN = 0;
    uint8 internal constant WORKING = 1;
    uint8 internal constant DELIVERED = 2;
    uint8 internal constant DISPUTED = 3;
    uint8 internal constant ANSWERED = 4;
    uint8 internal constant CLOSED = 16;
    uint8 internal constant CANCELLED = 31;

    /// @dev One slot. `clock` is deliverBy while working, then the time of the last step.
    struct Job {
        address provider;
        uint40 expiredAt;
        Status status;
        uint8 phase;
        uint40 clock;
    }

    /// @dev One slot.
    struct Amounts {
        uint128 budget;
        uint128 penalty;
    }

    /// @dev Plain jobs only: of a deal all this is known.
    struct Plain {
        address client;
        address evaluator;
        string description;
    }

    /// @inheritdoc IJobEscrow
    mapping(address to => uint256 amount) public owed;
    uint256 public jobCounter;
    address public immutable token;

    mapping(uint256 jobId => Job) internal _jobs;
    mapping(uint256 jobId => Amounts) internal _amounts;
    mapping(uint256 jobId => Plain) private _plain;
    mapping(uint256 jobId => bytes32) private _deliverables;

    /// @notice The token has no code.
    error NotAToken(address token);

    constructor(address token_) {
        if (token_.code.length == 0) revert NotAToken(token_);
        token = token_;
    }

    // ------------------------------------------------------------------------------ plain jobs

    function createJob(
        address provider,
        address evaluator,
        uint256 expiredAt,
        string calldata description,
        address hook
    ) external nonReentrant returns (uint256 id) {
        // A job whose evaluator or provider is this contract would look like a deal.
        if (evaluator == address(0) || evaluator == address(this)) revert BadEvaluator(evaluator);
        if (provider == address(this) || provider == evaluator) revert BadProvider(provider);
        if (expiredAt <= block.timestamp || expiredAt > type(uint40).max) revert BadExpiry(expiredAt);
        if (hook != address(0)) revert HookNotSupported(hook);

        id = ++jobCounter;
        Job storage job = _jobs[id];
        job.provider = provider;
        job.expiredAt = uint40(expiredAt);
        _plain[id] = Plain(msg.sender, evaluator, description);
        emit JobCreated(id, msg.sender, provider, evaluator, expiredAt, address(0));
    }

    function setProvider(uint256 id, address provider, bytes calldata) external nonReentrant {
        Job storage job = _plainIn(id, Status.Open);
        if (msg.sender != _plain[id].client) revert NotAllowed(id, msg.sender);
        if (job.provider != address(0)) revert BadProvider(job.provider);
        if (provider == address(0) || provider == address(this) || provider == _plain[id].evaluator) {
            revert BadProvider(provider);
        }
        job.provider = provider;
        emit ProviderSet(id, provider);
    }

    function setBudget(uint256 id, uint256 amount, bytes calldata) external nonReentrant {
        Job storage job = _plainIn(id, Status.Open);
        if (msg.sender != _plain[id].client && msg.sender != job.provider) revert NotAllowed(id, msg.sender);
        if (amount > type(uint128).max) revert BadBudget(amount);
        _amounts[id].budget = uint128(amount);
        emit BudgetSet(id, amount);
    }

    function fund(uint256 id, uint256 expectedBudget, bytes calldata) external nonReentrant {
        Job storage job = _plainIn(id, Status.Open);
        if (msg.sender != _plain[id].client) revert NotAllowed(id, msg.sender);
        if (job.provider == address(0)) revert BadProvider(address(0));
        uint256 budget = _amounts[id].budget;
        if (budget == 0) revert BadBudget(0);
        // The provider may change the budget up to this moment; the client says which one he means.
        if (budget != expectedBudget) revert BudgetChanged(expectedBudget, budget);

        job.status = Status.Funded;
        emit JobFunded(id, msg.sender, budget);
        _pull(msg.sender, budget);
    }

    function submit(uint256 id, bytes32 deliverable, bytes calldata) external nonReentrant {
        Job memory job = _jobs[id];
        if (job.status != Status.Funded) revert WrongStatus(id, job.status);
        if (msg.sender != job.provider) revert NotAllowed(id, msg.sender);
        if (job.phase != PLAIN && block.timestamp > job.clock) revert TooLate(id, job.clock);
        _submit(id, job, deliverable);
    }

    function complete(uint256 id, bytes32 reason, bytes calldata) external nonReentrant {
        Job storage job = _plainIn(id, Status.Submitted);
        if (msg.sender != _plain[id].evaluator) revert NotAllowed(id, msg.sender);
        uint256 budget = _amounts[id].budget;

        job.status = Status.Completed;
        emit JobCompleted(id, msg.sender, reason);
        emit PaymentReleased(id, job.provider, budget);
        _push(job.provider, budget);
    }

    function reject(uint256 id, bytes32 reason, bytes calldata) external nonReentrant {
        Job storage job = _jobs[id];
        Status status = job.status;
        if (job.phase != PLAIN) revert JobIsDeal(id);
        if (uint8(status) > uint8(Status.Submitted)) revert WrongStatus(id, status);
        address client = _plain[id].client;
        if (msg.sender != (status == Status.Open ? client : _plain[id].evaluator)) {
            revert NotAllowed(id, msg.sender);
        }

        job.status = Status.Rejected;
        emit JobRejected(id, msg.sender, reason);
        // An Open job holds no money, whatever its budget says.
        if (status != Status.Open) _refund(id, client);
    }

    function claimRefund(uint256 id) external nonReentrant {
        Job storage job = _jobs[id];
        Status status = job.status;
        if (status != Status.Funded && status != Status.Submitted) revert WrongStatus(id, status);
        if (block.timestamp < job.expiredAt) revert TooEarly(id, job.expiredAt);

        job.status = Status.Expired;
        emit JobExpired(id);
        if (job.phase == PLAIN) {
            _refund(id, _plain[id].client);
        } else {
            // From this contract to this contract: nobody can take a deal's money by its expiry.
            emit Refunded(id, address(this), _amounts[id].budget);
        }
    }

    function withdraw(address to) external nonReentrant {
        uint256 amount = owed[to];
        if (amount == 0) revert NothingOwed(to);
        owed[to] = 0;
        emit Withdrawn(to, amount);
        IERC20(token).safeTransfer(to, amount);
    }

    function getJob(uint256 id) external view returns (JobView memory job) {
        Job storage stored = _jobs[id];
        uint8 phase = stored.phase;
        Plain storage plain = _plain[id];
        if (phase == PLAIN && plain.client == address(0)) revert JobNotFound(id);

        job.id = id;
        job.provider = stored.provider;
        job.budget = _amounts[id].budget;
        job.expiredAt = stored.expiredAt;
        job.status = stored.status;
        job.deliverable = _deliverables[id];
        if (phase == PLAIN) {
            job.client = plain.client;
            job.evaluator = plain.evaluator;
            job.description = plain.description;
            job.submittedAt = stored.clock;
        } else {
            job.client = address(this);
            job.evaluator = address(this);
            job.description = string.concat("coase:terms:", Strings.toHexString(id, 32));
            if (phase == DELIVERED || phase >= CLOSED) job.submittedAt = stored.clock;
        }
    }

    // ---------------------------------------------------------------------- for the evaluator

    function _submit(uint256 id, Job memory job, bytes32 deliverable) internal {
        job.status = Status.Submitted;
        job.clock = uint40(block.timestamp);
        if (job.phase == WORKING) job.phase = DELIVERED;
        _jobs[id] = job;
        _deliverables[id] = deliverable;
        emit JobSubmitted(id, job.provider, deliverable);
    }

    /// @dev Takes `amount` from `from` by allowance and checks that exactly it arrived.
    function _pull(address from, uint256 amount) internal {
        uint256 balance = IERC20(token).balanceOf(address(this));
        IERC20(token).safeTransferFrom(from, address(this), amount);
        _checkReceived(balance, amount);
    }

    /// @dev Tokens that take a fee, or that say they moved what they did not, end here.
    function _checkReceived(uint256 balanceBefore, uint256 amount) internal view {
        uint256 balanceAfter = IERC20(token).balanceOf(address(this));
        if (balanceAfter < balanceBefore || balanceAfter - balanceBefore != amount) {
            revert WrongAmountReceived(amount, balanceBefore, balanceAfter);
        }
    }

    /// @dev Pays, or notes the debt. A party that cannot be paid must not hold the other's money, so
    /// this never reverts. All state is final before it is called.
    function _push(address to, uint256 amount) internal {
        if (amount == 0) return;
        if (!IERC20(token).trySafeTransfer(to, amount)) {
            owed[to] += amount;
            emit PaymentOwed(to, amount);
        }
    }

    function _refund(uint256 id, address client) private {
        uint256 budget = _amounts[id].budget;
        emit Refunded(id, client, budget);
        _push(client, budget);
    }

    function _plainIn(uint256 id, Status needed) private view returns (Job storage job) {
        job = _jobs[id];
        if (job.phase != PLAIN) revert JobIsDeal(id);
        if (job.status != needed) revert WrongStatus(id, job.status);
    }
}
